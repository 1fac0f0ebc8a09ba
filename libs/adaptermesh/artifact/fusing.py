"""A fusion and the bottlenecks that it weighs, at one place. Source: AdapterFusion (arXiv:2005.00247).

The library computes it in `methods/bottleneck.py`, compose_fuse, and `methods/modeling.py`, BertFusion:
without the 1/sqrt(d) of other attention, and with the members' outputs without their residual as keys and
values.
"""

from collections.abc import Callable, Sequence

from adaptermesh.artifact.bottleneck_steps import Bottleneck, Step, untaken
from adaptermesh.artifact.effects import Effect
from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.plan import Floats


def check_fuse(modules: Sequence[ModuleOp], members: int) -> None:
    """Checks that a fusion is asked for with as many adapters as it was trained with.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED).
    """
    wanted = (modules[0].options or {})["members"]
    if str(members) != wanted:
        raise untaken(
            f"the fusion was trained on {wanted} adapters, the fuse names {members}: name all of them "
            "after it"
        )


def bottleneck_of(name: str, effect: Effect) -> Bottleneck:
    """The one bottleneck that a member of a fusion is at a place; raises as `fused` does."""
    vectors = (effect.in_scale, effect.out_scale, effect.shift)
    if effect.lowrank or effect.whole or any(vector is not None for vector in vectors):
        raise untaken(f"a fusion weighs bottlenecks alone, and '{name}' is more than that")
    if len(effect.steps) != 1 or effect.steps[0].fusing is not None:
        raise untaken(f"a fusion weighs single bottlenecks, and '{name}' has several at one place")
    return effect.steps[0].parts[0]


def fused(fusion: ModuleOp, read: Callable[[str], Floats], parts: Sequence[Bottleneck]) -> Step:
    """What a fusion makes of bottlenecks; `read` gives its tensors.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for bottlenecks that it can't weigh.
    """
    inputs = {part.input for part in parts}
    if "residual" in inputs:
        raise untaken(
            "a fusion of parallel bottlenecks, to which its library adds the residual stream twice: "
            "train one of sequential ones"
        )
    if len(inputs) > 1:
        raise untaken("a fusion of bottlenecks that read differently: train one of adapters of one kind")
    if (fusion.options or {})["query"] == "output" and inputs != {"output"}:
        raise untaken(
            "the fusion's query is the output of the sub-layer (query_before_ln), what its adapters read is "
            "not: train it with query_before_ln=False"
        )
    return Step(tuple(parts), {slot: read(name) for slot, name in fusion.tensors.items()})
