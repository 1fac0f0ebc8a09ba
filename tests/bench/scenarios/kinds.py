"""A batch of adapters of several kinds, against the same batch without adapters."""

from tests.bench.adapter_files import KINDS, kind_name
from tests.bench.bench import Bench, Runner, rates
from tests.bench.figures import ratio
from tests.bench.peer import Peer
from tests.bench.result import Lane, Result, compare
from tests.bench.workload import Workload

# Of eight adapters that come again and again, one after the other.
_MIX = ("lora", "lora", "lora", "lora", "bottleneck", "bottleneck", "ia3", "ia3")


def run(bench: Bench) -> Result:
    scale = bench.scale
    base, mixed = "base", "4 LoRA, 2 bottleneck, 2 IA3"
    names: dict[str, list[str | None]] = {
        base: [None] * scale.rows,
        mixed: _cycled(_MIX, scale.rows),
        **{f"8 {kind}": _cycled((kind,) * len(_MIX), scale.rows) for kind in KINDS},
    }

    def asking(lane: str, number: int, in_flight: int = 0) -> Workload:
        return Workload(bench.prompts.draw(lane, number, names[lane]), scale.output_tokens, in_flight)

    def runner(lane: str, engine: Peer) -> Runner:
        return Runner(lane, engine, lambda number: asking(lane, number))

    with bench.peers() as peers:
        engine = peers.need(
            "engine", "adaptermesh", max_batch_rows=scale.rows, device_slots=len(KINDS) * len(_MIX)
        )
        answers = bench.measure([runner(lane, engine) for lane in names])
        last = bench.settings.rounds - 1
        alone = engine.ask("run", workload=asking(mixed, last, in_flight=1).to_json())["tokens"]
        pairs = list(zip(answers[mixed][last]["tokens"], alone, strict=True))
        rate = {lane: rates(found) for lane, found in answers.items()}
        return Result(
            figures=(
                ratio(f"{mixed} / {base}", rate[mixed], rate[base], 0.80),
                *(ratio(f"8 {kind} / {base}", rate[f"8 {kind}"], rate[base]) for kind in KINDS),
            ),
            lanes=tuple(Lane(lane, "tok/s", values) for lane, values in rate.items()),
            checks=(compare(mixed, "each of its rows alone", pairs),),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )


def _cycled(kinds: tuple[str, ...], count: int) -> list[str | None]:
    """The n-th adapter of a kind is named after its kind and place."""
    return [kind_name(kinds[index % len(kinds)], index % len(kinds)) for index in range(count)]
