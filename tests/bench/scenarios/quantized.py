"""The standard workload with the base's layers in 8 bits, against the exact base."""

from collections.abc import Callable

from adaptermesh.worker.engine.forward.int8 import int8_is_exact
from tests.bench.bench import Bench, Runner, differences, rates
from tests.bench.figures import ratio
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled

BASE, BASE_INT8 = "base, float32", "base, int8"
MIXED, MIXED_INT8 = "mixed, float32", "mixed, int8"
_PAIRS = ((BASE_INT8, BASE), (MIXED_INT8, MIXED))


def run(bench: Bench) -> Result:
    if not int8_is_exact():
        return Result((), (), left_out=("int8, which needs a CPU with VNNI",))
    scale = bench.scale

    def of(names: list[str | None]) -> Callable[[int], Workload]:
        return lambda number: Workload(bench.prompts.draw("int8", number, names), scale.output_tokens)

    base, mixed = of([None] * scale.rows), of([*cycled(scale.rows, scale.adapters)])
    with bench.peers() as peers:
        exact = peers.need("engine", "float32", max_batch_rows=scale.rows)
        int8 = peers.need("engine", "int8", max_batch_rows=scale.rows, quantization="int8")
        lanes = [
            Runner(BASE, exact, base),
            Runner(BASE_INT8, int8, base),
            Runner(MIXED, exact, mixed),
            Runner(MIXED_INT8, int8, mixed),
        ]
        answers = bench.measure(lanes)
        found = {name: rates(answers[name]) for name in answers}
        return Result(
            figures=tuple(ratio(f"{fast} / {slow}", found[fast], found[slow], None) for fast, slow in _PAIRS),
            lanes=tuple(Lane(name, "tok/s", values) for name, values in found.items()),
            checks=tuple(differences(fast, slow, answers) for fast, slow in _PAIRS),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )
