"""An adapter of 10 MB from a real store process into a device slot, against a bare gRPC stream of it."""

import statistics
import time

from tests.bench.adapter_files import adapter_name
from tests.bench.bench import SETTLE_SECONDS, Bench
from tests.bench.figures import Figure, Spread, percentile, ratio
from tests.bench.peer import Peer
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled

# In this order in the first round; each round begins with another one.
_WAYS = ("cold", "stream", "raw")
_NAMES = {
    "cold": "cold switch: fetch, verify, stage",
    "stream": "read off the store, neither verified nor kept",
    "raw": "bare gRPC stream of the same bytes",
}


def run(bench: Bench) -> Result:
    scale = bench.scale
    files = min(scale.cold, scale.files)
    names = [adapter_name(index % files) for index in range(scale.cold)]
    with bench.peers() as peers:
        peer = peers.need("store", "store and engine", names=names[:files])
        found = _measure(bench, peer, names)
        workload = Workload(bench.prompts.draw("cold", 0, cycled(scale.checked, files)), scale.checked_tokens)
        answers = peer.ask("run", workload=workload.to_json())["tokens"]
        check = bench.check_with_peft(peers, "cold switch", workload.items, answers)
        medians = {way: [statistics.median(times) for times in rounds] for way, rounds in found.items()}
        return Result(
            figures=_figures(medians, found["cold"], peer.facts["adapter_bytes"] / 1e6),
            lanes=tuple(
                Lane(_NAMES[way], "ms", tuple(value * 1e3 for value in medians[way])) for way in _WAYS
            ),
            checks=(check,) if check else (),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )


def _measure(bench: Bench, peer: Peer, names: list[str]) -> dict[str, list[list[float]]]:
    """Seconds of each transfer, by way and round."""
    found: dict[str, list[list[float]]] = {way: [] for way in _WAYS}
    for way in _WAYS:
        peer.ask(way, names=names[:2])
    for number in bench.rounds():
        start = number % len(_WAYS)
        for way in (*_WAYS[start:], *_WAYS[:start]):
            time.sleep(SETTLE_SECONDS)
            found[way].append(peer.ask(way, names=names))
        print(f"  round {number + 1}: {_medians(found, number)}", flush=True)
    return found


def _figures(
    medians: dict[str, list[float]], cold: list[list[float]], megabytes: float
) -> tuple[Figure, ...]:
    by_round = [percentile(times, 99) * 1e3 for times in cold]
    p99 = percentile([seconds for times in cold for seconds in times], 99) * 1e3
    name = f"cold switch of {megabytes:.1f} MB"
    return (
        ratio(f"{name} / bare gRPC stream", medians["cold"], medians["raw"], 2.0, at_most=True),
        Figure(f"{name}, p99", Spread(p99, min(by_round), max(by_round)), 100.0, at_most=True, unit="ms"),
        ratio(f"{name} / read off the store only", medians["cold"], medians["stream"], at_most=True),
    )


def _medians(found: dict[str, list[list[float]]], number: int) -> str:
    return ", ".join(f"{way} {statistics.median(found[way][number]) * 1e3:.1f} ms" for way in _WAYS)
