"""A stream of requests over 1,000 registered adapters by Zipf's law, against the same stream over 8.

Beside it the same law over adapters that are all in slots: as mixed, but nothing is missing.
"""

from tests.bench.bench import Bench, Runner, rates
from tests.bench.figures import ratio
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled, weights_of, zipf

# A server under load has a queue; what the engine prefetches, it finds there.
_QUEUE_FACTOR = 2


def run(bench: Bench) -> Result:
    scale = bench.scale
    few = f"{scale.adapters} adapters"
    many = f"{scale.registered} registered adapters, Zipf(1.0), {scale.slots} slots"
    resident = f"{scale.slots} adapters in {scale.slots} slots, the same law"
    in_flight = _QUEUE_FACTOR * scale.rows

    def of_few(number: int) -> Workload:
        names = cycled(scale.stream, scale.adapters)
        return Workload(bench.prompts.draw("few", number, names), scale.output_tokens, in_flight)

    def of_many(number: int) -> Workload:
        names = zipf(scale.stream, scale.registered, scale.files, number)
        return Workload(bench.prompts.draw("many", number, names), scale.output_tokens, in_flight)

    def of_resident(number: int) -> Workload:
        # Copies of one adapter count as one.
        drawn = zipf(scale.stream, scale.registered, scale.slots, number)
        names = [weights_of(name) for name in drawn if name is not None]
        return Workload(bench.prompts.draw("resident", number, names), scale.output_tokens, in_flight)

    with bench.peers() as peers:
        options = {"max_batch_rows": scale.rows, "device_slots": scale.slots}
        engine = peers.need("engine", "adaptermesh", **options)
        undisturbed = peers.need("engine", "adaptermesh, all resident", **options)
        answers = bench.measure(
            [
                Runner(few, engine, of_few),
                Runner(many, engine, of_many),
                Runner(resident, undisturbed, of_resident),
            ]
        )
        last = bench.settings.rounds - 1
        check = bench.check_with_peft(peers, many, of_many(last).items, answers[many][last]["tokens"])
        return Result(
            figures=(
                ratio(f"{many} / {few}", rates(answers[many]), rates(answers[few]), 0.95),
                ratio(f"{many} / {resident}", rates(answers[many]), rates(answers[resident])),
            ),
            lanes=tuple(Lane(name, "tok/s", rates(found)) for name, found in answers.items()),
            checks=(check,) if check else (),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )
