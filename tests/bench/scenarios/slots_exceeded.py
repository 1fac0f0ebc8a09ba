"""Clients that ask again as soon as they are answered, with as many adapters as slots and with twice as many.

Each request asks for any of the adapters. With as many clients as slots a switch is all that is in the way;
with twice as many clients some requests must wait until a slot's rows have ended.
"""

import statistics
from collections.abc import Callable
from typing import Any

from tests.bench.bench import Bench, Runner
from tests.bench.figures import ratio
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, uniform


def run(bench: Bench) -> Result:
    scale = bench.scale
    slots = scale.adapters
    cases = {
        f"{clients} clients, {adapters} adapters, {slots} slots": (clients, adapters)
        for clients in (scale.clients, 2 * scale.clients)
        for adapters in (slots, 2 * slots)
    }
    with bench.peers() as peers:
        engine = peers.need("engine", "adaptermesh", max_batch_rows=2 * scale.clients, device_slots=slots)
        lanes = [Runner(name, engine, _asking(bench, name, *case)) for name, case in cases.items()]
        answers = bench.measure(lanes)
        ttft = {name: _median_ttft(found) for name, found in answers.items()}
        calm, calm_over, crowded, crowded_over = cases
        last = bench.settings.rounds - 1
        items = lanes[1].workload(last).items
        check = bench.check_with_peft(peers, calm_over, items, answers[calm_over][last]["tokens"])
        title = "median TTFT, twice as many adapters as slots / all resident"
        return Result(
            figures=(
                ratio(f"{title}, {scale.clients} clients", ttft[calm_over], ttft[calm], 2.0, at_most=True),
                ratio(f"{title}, {2 * scale.clients} clients", ttft[crowded_over], ttft[crowded]),
            ),
            lanes=tuple(Lane(f"median TTFT, {name}", "ms", _ms(values)) for name, values in ttft.items()),
            checks=(check,) if check else (),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )


def _asking(bench: Bench, label: str, clients: int, adapters: int) -> Callable[[int], Workload]:
    scale = bench.scale

    def workload(number: int) -> Workload:
        items = bench.prompts.draw(label, number, uniform(scale.asked, adapters, number))
        return Workload(items, scale.asked_tokens, clients)

    return workload


def _median_ttft(answers: list[dict[str, Any]]) -> list[float]:
    """Seconds, by round."""
    return [statistics.median(times[0] for times in answer["times"]) for answer in answers]


def _ms(seconds: list[float]) -> tuple[float, ...]:
    return tuple(value * 1e3 for value in seconds)
