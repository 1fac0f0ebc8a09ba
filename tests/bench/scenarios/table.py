"""All scenarios, in the order of the report."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.bench import Bench
from tests.bench.result import Result
from tests.bench.scenarios import (
    cold_switch,
    decode_bound,
    many_adapters,
    many_rows,
    quantized,
    slots_exceeded,
    throughput,
    warm_switch,
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One function that measures, and what the report says of it."""

    title: str
    about: str
    run: Callable[[Bench], Result]


SCENARIOS = {
    "throughput": Scenario(
        "Base only and adapters mixed, against the peers",
        "One batch of requests, submitted together; prompts of one length, greedy, the end token ignored, "
        "float32. Adapters: LoRA of rank 8 on all seven projections. Output tokens a second; the time "
        "includes the prompts.",
        throughput.run,
    ),
    "quantized": Scenario(
        "The base's layers in 8 bits",
        "As above, in two engines of ours. Random tokens as prompts are the hardest case for equal answers; "
        "an answer counts as different from its first different token on.",
        quantized.run,
    ),
    "many-rows": Scenario(
        "A large batch with an adapter for each row",
        "As above, in one engine.",
        many_rows.run,
    ),
    "many-adapters": Scenario(
        "A thousand registered adapters",
        "A stream of requests with a queue as long as the batch. What is not in a slot comes from host "
        "memory (1 GiB), from the disk cache or, the first time, from a local source.",
        many_adapters.run,
    ),
    "slots-exceeded": Scenario(
        "More adapters than slots",
        "Clients that ask again as soon as they are answered; each request asks for any of the adapters, "
        "all of which are in host memory. The load offered is the same with few and with many adapters.",
        slots_exceeded.run,
    ),
    "warm-switch": Scenario(
        "Warm switch",
        "One request after the other, all adapters in device slots.",
        warm_switch.run,
    ),
    "decode-bound": Scenario(
        "How near a decode step is to the memory's limit",
        "The bandwidth is that of a sum over 2 GiB with all cores, the best of five in each round.",
        decode_bound.run,
    ),
    "cold-switch": Scenario(
        "Cold switch",
        "A store process, and an engine that fetches as a worker does, over gRPC on loopback; the adapter "
        "is in no tier before. Beside it a bare gRPC server that streams the same bytes from memory in "
        "pieces of 512 KiB. The p99 is over all rounds; in brackets the lowest and the highest round.",
        cold_switch.run,
    ),
}
