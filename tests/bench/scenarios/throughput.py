"""The standard workload: 16 requests of 64 + 64 tokens, base only and over 8 adapters, against every peer."""

from collections.abc import Callable

from tests.bench.adapter_files import RANK
from tests.bench.bench import Bench, Peers, Runner, differences, rates
from tests.bench.figures import Figure, ratio
from tests.bench.result import Lane, Result
from tests.bench.workload import Workload, cycled

OWN_BASE, OWN_MIXED = "adaptermesh base", "adaptermesh mixed"
VLLM_BASE, VLLM_MIXED = "vLLM base", "vLLM mixed"
TRANSFORMERS = "transformers generate"
PEFT_NAMES, PEFT_GROUPS = "peft adapter_names", "peft set_adapter"

# ours, theirs, at least; the last two have no promise.
_FIGURES = (
    (OWN_BASE, VLLM_BASE, 1.6),
    (OWN_MIXED, VLLM_MIXED, 3.3),
    (OWN_MIXED, PEFT_NAMES, 4.5),
    (OWN_MIXED, OWN_BASE, 0.90),
    (OWN_BASE, TRANSFORMERS, None),
    (OWN_MIXED, PEFT_GROUPS, None),
)
_SAME_WORK = (
    (OWN_BASE, VLLM_BASE),
    (OWN_BASE, TRANSFORMERS),
    (OWN_MIXED, VLLM_MIXED),
    (OWN_MIXED, PEFT_NAMES),
    (OWN_MIXED, PEFT_GROUPS),
)


def run(bench: Bench) -> Result:
    with bench.peers() as peers:
        lanes = _lanes(bench, peers)
        answers = bench.measure(lanes)
        by_name = {lane.name: rates(answers[lane.name]) for lane in lanes}
        figures: list[Figure] = [
            ratio(f"{ours} / {theirs}", by_name[ours], by_name[theirs], target)
            for ours, theirs, target in _FIGURES
            if theirs in by_name
        ]
        return Result(
            figures=tuple(figures),
            lanes=tuple(Lane(name, "tok/s", values) for name, values in by_name.items()),
            checks=tuple(
                differences(ours, theirs, answers) for ours, theirs in _SAME_WORK if theirs in by_name
            ),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )


def _lanes(bench: Bench, peers: Peers) -> list[Runner]:
    scale = bench.scale
    engine = peers.need("engine", "adaptermesh", max_batch_rows=scale.rows)
    vllm = {"rows": scale.rows, "adapters": scale.adapters, "rank": RANK, "context_tokens": 2048}
    found = [
        (OWN_BASE, engine, _base(bench)),
        (VLLM_BASE, peers.start("vllm", VLLM_BASE, lora=False, **vllm), _base(bench)),
        (TRANSFORMERS, peers.start("transformers", TRANSFORMERS, way="base"), _base(bench)),
        (OWN_MIXED, engine, _mixed(bench)),
        (VLLM_MIXED, peers.start("vllm", VLLM_MIXED, lora=True, **vllm), _mixed(bench)),
        (PEFT_NAMES, peers.start("transformers", PEFT_NAMES, way="adapter_names"), _mixed(bench)),
        (PEFT_GROUPS, peers.start("transformers", PEFT_GROUPS, way="set_adapter"), _mixed(bench)),
    ]
    return [Runner(name, peer, workload) for name, peer, workload in found if peer is not None]


def _base(bench: Bench) -> Callable[[int], Workload]:
    scale = bench.scale
    return lambda number: Workload(
        bench.prompts.draw("base", number, [None] * scale.rows), scale.output_tokens
    )


def _mixed(bench: Bench) -> Callable[[int], Workload]:
    scale = bench.scale
    return lambda number: Workload(
        bench.prompts.draw("mixed", number, cycled(scale.rows, scale.adapters)), scale.output_tokens
    )
