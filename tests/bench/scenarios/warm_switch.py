"""One request after the other, each with another resident adapter, against the same adapter all the time."""

from tests.bench.adapter_files import adapter_name
from tests.bench.bench import Bench, Runner
from tests.bench.figures import ratio
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled


def run(bench: Bench) -> Result:
    scale = bench.scale
    stay, switch = "same adapter", "another adapter each time"

    def of_stay(number: int) -> Workload:
        names = [adapter_name(number % scale.adapters)] * scale.sequential
        return Workload(bench.prompts.draw("stay", number, names), scale.sequential_tokens, 1)

    def of_switch(number: int) -> Workload:
        names = cycled(scale.sequential, scale.adapters)
        return Workload(bench.prompts.draw("switch", number, names), scale.sequential_tokens, 1)

    with bench.peers() as peers:
        engine = peers.need("engine", "adaptermesh", device_slots=2 * scale.adapters)
        lanes = [Runner(stay, engine, of_stay), Runner(switch, engine, of_switch)]
        # All adapters are resident before anything is measured.
        lanes[1].run(-2)
        answers = bench.measure(lanes)
        times = {
            name: [answer["seconds"] / scale.sequential for answer in found]
            for name, found in answers.items()
        }
        last = bench.settings.rounds - 1
        items = of_switch(last).items
        check = bench.check_with_peft(peers, switch, items, answers[switch][last]["tokens"])
        return Result(
            figures=(ratio("warm switch / no switch", times[switch], times[stay], 1.02, at_most=True),),
            lanes=tuple(
                Lane(f"one request, {name}", "ms", tuple(value * 1e3 for value in values))
                for name, values in times.items()
            ),
            checks=(check,) if check else (),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )
