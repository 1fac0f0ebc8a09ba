"""A decode step of 16 rows against the time that reading all weights once takes at the measured bandwidth."""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from tests.bench.bench import Bench, Peers, Runner
from tests.bench.figures import ratio
from tests.bench.peer import Peer
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled


def run(bench: Bench) -> Result:
    scale = bench.scale
    base, mixed = f"{scale.rows} rows, base", f"{scale.rows} rows, {scale.adapters} adapters"
    with bench.peers() as peers:
        memory, engine = peers.need("memory", "memory"), _engine(bench, peers)
        weight_bytes = engine.facts["weight_bytes"]
        lanes = [
            Runner(base, engine, _workload(bench, "bound base", [None] * scale.rows)),
            Runner(mixed, engine, _workload(bench, "bound mixed", cycled(scale.rows, scale.adapters))),
        ]
        read: list[float] = []
        copy: list[float] = []
        steps: dict[str, list[float]] = {base: [], mixed: []}
        for lane in lanes:
            lane.run(-1)
        for number in bench.rounds():
            speed = memory.ask("run")
            read.append(speed["read"])
            copy.append(speed["copy"])
            for lane in lanes:
                steps[lane.name].append(decode_step(lane.run(number)))
            print(
                f"  round {number + 1}: {read[-1] / 1e9:.1f} GB/s, step {steps[base][-1] * 1e3:.1f} ms",
                flush=True,
            )
        bound = [weight_bytes / speed for speed in read]
        return Result(
            figures=(
                ratio(
                    "decode step / weights read once, base", steps[base], bound, 1.5, at_most=True, aim=True
                ),
                ratio("decode step / weights read once, mixed", steps[mixed], bound, at_most=True),
            ),
            lanes=(
                Lane("memory, read", "GB/s", tuple(value / 1e9 for value in read)),
                Lane("memory, copy (bytes read and written)", "GB/s", tuple(value / 1e9 for value in copy)),
                Lane(f"weights ({weight_bytes / 1e6:.0f} MB) read once", "ms", _ms(bound)),
                *(Lane(f"decode step, {name}", "ms", _ms(values)) for name, values in steps.items()),
            ),
            versions=peers.versions(),
        )


def decode_step(answer: dict[str, Any]) -> float:
    """Median seconds between two tokens of one row while all rows decode.

    The last request to get its first token sees no more prompts computed beside it.
    """
    last: list[float] = max(answer["times"], key=lambda times: times[0])
    return statistics.median(after - before for before, after in itertools.pairwise(last))


def _engine(bench: Bench, peers: Peers) -> Peer:
    return peers.need("engine", "adaptermesh", max_batch_rows=bench.scale.rows)


def _workload(bench: Bench, label: str, adapters: list[str | None]) -> Callable[[int], Workload]:
    return lambda number: Workload(bench.prompts.draw(label, number, adapters), bench.scale.output_tokens)


def _ms(seconds: list[float]) -> tuple[float, ...]:
    return tuple(value * 1e3 for value in seconds)
