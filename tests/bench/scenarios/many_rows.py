"""A large batch in which every row has another adapter, against the same batch without adapters."""

from tests.bench.bench import Bench, Runner, rates
from tests.bench.figures import ratio
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled


def run(bench: Bench) -> Result:
    scale, rows = bench.scale, bench.scale.many_rows
    base, mixed = f"{rows} rows, base", f"{rows} rows, {rows} adapters"

    def of_base(number: int) -> Workload:
        return Workload(bench.prompts.draw("many base", number, [None] * rows), scale.output_tokens)

    def of_mixed(number: int) -> Workload:
        return Workload(bench.prompts.draw("many mixed", number, cycled(rows, rows)), scale.output_tokens)

    with bench.peers() as peers:
        engine = peers.need("engine", "adaptermesh", max_batch_rows=rows, device_slots=rows)
        answers = bench.measure([Runner(base, engine, of_base), Runner(mixed, engine, of_mixed)])
        last = bench.settings.rounds - 1
        check = bench.check_with_peft(peers, mixed, of_mixed(last).items, answers[mixed][last]["tokens"])
        return Result(
            figures=(ratio(f"{mixed} / {base}", rates(answers[mixed]), rates(answers[base]), 0.80),),
            lanes=tuple(Lane(name, "tok/s", rates(found)) for name, found in answers.items()),
            checks=(check,) if check else (),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )
