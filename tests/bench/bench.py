"""What a scenario works with: peers, rounds, prompts, and the order in which things are measured."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.adapter_files import ensure_adapters
from tests.bench.environments import KINDS, python_of
from tests.bench.peer import Peer
from tests.bench.result import Check, compare
from tests.bench.workload import Item, Prompts, Scale, Workload, weights_of

WARM_UP = -1
"""The round that is run and thrown away."""

# Threads of OpenMP go on spinning for a while after their last work.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for on the command line."""

    model: Path
    cache: Path
    rounds: int
    scale: Scale
    without: frozenset[str]


@dataclass(slots=True)
class Peers:
    """The processes of one scenario."""

    settings: Settings
    adapters: Path
    stack: contextlib.ExitStack
    started: list[Peer] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def start(self, kind: str, name: str, **options: Any) -> Peer | None:
        """Starts and loads a peer; None if it was to be left out."""
        if kind in self.settings.without:
            self.left_out.append(name)
            return None
        return self.need(kind, name, **options)

    def need(self, kind: str, name: str, **options: Any) -> Peer:
        """Starts and loads a peer that can't be left out."""
        spec, folder = KINDS[kind], self.settings.cache / kind
        folder.mkdir(parents=True, exist_ok=True)
        python = python_of(spec, folder)
        print(f"  loading {name}", flush=True)
        log = folder / f"{name.replace(' ', '-')}.log"
        peer = Peer(name, [python, "-m", spec.module], spec.environment(folder), log)
        self.stack.callback(peer.close)
        model, adapters = str(self.settings.model), str(self.adapters)
        peer.facts = peer.ask("load", model=model, adapters=adapters, options=options)
        self.started.append(peer)
        return peer

    def versions(self) -> dict[str, dict[str, str]]:
        """What each peer ran with: packages, and threads where it said so."""
        found: dict[str, dict[str, str]] = {}
        for peer in self.started:
            threads = {"threads": str(peer.facts["threads"])} if "threads" in peer.facts else {}
            found[peer.name] = {**peer.facts["versions"], **threads}
        return found


@dataclass(frozen=True, slots=True)
class Runner:
    """One lane: a peer and what it is asked in each round."""

    name: str
    peer: Peer
    workload: Callable[[int], Workload]

    def run(self, round_number: int) -> dict[str, Any]:
        """The peer's answer; `rate` is added, in output tokens a second."""
        workload = self.workload(round_number)
        time.sleep(SETTLE_SECONDS)
        answer: dict[str, Any] = self.peer.ask("run", workload=workload.to_json())
        wrong = [tokens for tokens in answer["tokens"] if len(tokens) != workload.output_tokens]
        if wrong:
            raise ValueError(f"{self.name}: {len(wrong)} answers have not {workload.output_tokens} tokens")
        answer["rate"] = workload.tokens / answer["seconds"]
        return answer


class Bench:
    """One run of the benchmarks."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scale = settings.scale
        config = json.loads((settings.model / "config.json").read_text())
        self.prompts = Prompts(config["vocab_size"], settings.scale.prompt_tokens)

    @contextlib.contextmanager
    def peers(self) -> Iterator[Peers]:
        """Processes that end with the block."""
        adapters = ensure_adapters(self.settings.cache, self.settings.model, self.scale.files)
        with contextlib.ExitStack() as stack:
            yield Peers(self.settings, adapters, stack)

    def measure(self, lanes: Sequence[Runner]) -> dict[str, list[dict[str, Any]]]:
        """Runs all lanes in turn, round after round, one at a time; each round begins with another lane."""
        for lane in lanes:
            print(f"  warming up {lane.name}", flush=True)
            lane.run(WARM_UP)
        answers: dict[str, list[dict[str, Any]]] = {lane.name: [] for lane in lanes}
        for round_number in range(self.settings.rounds):
            start = round_number % len(lanes)
            for lane in (*lanes[start:], *lanes[:start]):
                answer = lane.run(round_number)
                answers[lane.name].append(answer)
                print(f"  round {round_number + 1}: {lane.name}: {answer['rate']:.1f} tok/s", flush=True)
        return answers

    def rounds(self) -> range:
        return range(self.settings.rounds)

    def check_with_peft(
        self, peers: Peers, ours: str, items: Sequence[Item], tokens: Sequence[Sequence[int]]
    ) -> Check | None:
        """Compares the beginnings of some answers with peft's, after everything was measured."""
        peft = peers.start("transformers", "peft check", way="adapter_names")
        if peft is None:
            return None
        step = max(1, len(items) // self.scale.checked)
        chosen = range(0, len(items), step)
        asked = tuple(Item(items[index].prompt, _weights(items[index].adapter)) for index in chosen)
        answer = peft.ask("run", workload=Workload(asked, self.scale.checked_tokens).to_json())
        pairs = [(tokens[index], theirs) for index, theirs in zip(chosen, answer["tokens"], strict=True)]
        return compare(ours, "peft adapter_names", pairs)


def _weights(adapter: str | None) -> str | None:
    return None if adapter is None else weights_of(adapter)


def rates(answers: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """Output tokens a second, by round."""
    return tuple(answer["rate"] for answer in answers)


def differences(ours: str, theirs: str, answers: dict[str, list[dict[str, Any]]]) -> Check:
    """Compares two lanes of the same workload over all rounds."""
    pairs = [
        pair
        for mine, other in zip(answers[ours], answers[theirs], strict=True)
        for pair in zip(mine["tokens"], other["tokens"], strict=True)
    ]
    return compare(ours, theirs, pairs)
