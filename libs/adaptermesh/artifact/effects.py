"""What adapters do at one site of one layer, and how that is scaled, stacked and averaged. All in float32.

With weights w, a stack and an average are exact where they are taken:

- low-rank parts add up, each times its weight: their ranks stand side by side;
- factors multiply in a stack; weighted, a factor l is 1 + w (l - 1), which in an average is the mean of them;
- bottlenecks act one after the other in a stack; in an average those that read the same with the same
  activation add up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from adaptermesh.artifact.bottleneck_steps import (
    Step,
    in_a_row,
    side_by_side,
    steps_of,
    untaken,
    weighted,
)
from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import AFFINE, BOTTLENECK, BOTTLENECK_GROUP, LOWRANK
from adaptermesh.artifact.plan import Floats

_BESIDE = (BOTTLENECK, BOTTLENECK_GROUP)


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scale * B A x`. a: [r, in]. b: [out, r]."""

    a: Floats
    b: Floats
    scale: float


@dataclass(frozen=True, slots=True)
class Effect:
    """All that happens at a site; `whole` are modules that can only be taken as they are."""

    lowrank: tuple[LowRank, ...] = ()
    steps: tuple[Step, ...] = ()
    in_scale: Floats | None = None
    out_scale: Floats | None = None
    shift: Floats | None = None
    whole: tuple[tuple[ModuleOp, Mapping[str, Floats]], ...] = field(default=())


def effect_of(modules: Sequence[ModuleOp], read: Callable[[str], Floats]) -> Effect:
    """The effect of one adapter's modules at one site of one layer; `read` gives their tensors."""
    found = Effect(steps=steps_of([module for module in modules if module.op in _BESIDE], read))
    # A magnitude is bound to the low-rank part beside it.
    bound = any("magnitude" in module.tensors for module in modules)
    for module in modules:
        if module.op in _BESIDE:
            continue
        tensors = {slot: read(name) for slot, name in module.tensors.items()}
        if bound or module.op not in (LOWRANK, AFFINE):
            found = replace(found, whole=(*found.whole, (module, tensors)))
        elif module.op == LOWRANK:
            part = LowRank(tensors["A"], tensors["B"], module.scale)
            found = replace(found, lowrank=(*found.lowrank, part))
        else:
            shift = tensors.get("bias_delta")
            found = replace(
                found,
                in_scale=tensors.get("in_scale"),
                out_scale=tensors.get("out_scale"),
                shift=None if shift is None else np.float32(module.scale) * shift,
            )
    return found


def scaled(effect: Effect, weight: float) -> Effect:
    """The effect times a weight; 1 leaves it as it is, 0 leaves nothing of it."""
    if weight == 1.0:
        return effect
    if effect.whole:
        raise untaken(f"{effect.whole[0][0].op} can't be weighted: give it no weight")
    return Effect(
        lowrank=tuple(replace(part, scale=part.scale * weight) for part in effect.lowrank),
        steps=weighted(effect.steps, weight),
        in_scale=_from_one(effect.in_scale, weight),
        out_scale=_from_one(effect.out_scale, weight),
        shift=None if effect.shift is None else np.float32(weight) * effect.shift,
    )


def stacked(effects: Sequence[Effect]) -> Effect:
    """All effects at once; `out_scale` of one also scales the low-rank parts of the others.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for what can't be taken together.
    """
    if len(effects) == 1:
        return effects[0]
    if any(effect.whole for effect in effects):
        op = next(module.op for effect in effects for module, _ in effect.whole)
        raise untaken(f"two adapters act at one site, one of them with {_worded(op)}")
    return Effect(
        lowrank=tuple(part for effect in effects for part in effect.lowrank),
        steps=in_a_row([effect.steps for effect in effects]),
        in_scale=_product([effect.in_scale for effect in effects]),
        out_scale=_product([effect.out_scale for effect in effects]),
        shift=_sum([effect.shift for effect in effects]),
    )


def averaged(present: Sequence[tuple[Effect, float]]) -> Effect:
    """The mean of effects, each with its share; what is missing to 1 is of members without an effect here.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for what has no exact mean.
    """
    if len(present) == 1:
        return scaled(*present[0])
    if any(effect.whole for effect, _ in present):
        op = next(module.op for effect, _ in present for module, _ in effect.whole)
        raise untaken(f"two adapters act at one site, one of them with {_worded(op)}")
    moved = sum(effect.in_scale is not None for effect, _ in present)
    if moved and any(effect.out_scale is not None or effect.lowrank for effect, _ in present):
        raise untaken("factors of inputs have no exact mean with factors of outputs or low-rank parts")
    if any(effect.out_scale is not None and effect.lowrank for effect, _ in present):
        raise untaken("an adapter that scales its own low-rank part has no exact mean with another")
    outs = [_from_one(effect.out_scale, weight) for effect, weight in present]
    if any(out is not None for out in outs) and any(effect.lowrank for effect, _ in present):
        raise untaken("factors of outputs have no exact mean with low-rank parts")
    parts = [scaled(effect, weight) for effect, weight in present]
    return Effect(
        lowrank=tuple(part for effect in parts for part in effect.lowrank),
        steps=side_by_side([effect.steps for effect in parts]),
        in_scale=_mean([effect.in_scale for effect in parts]),
        out_scale=_mean([effect.out_scale for effect in parts]),
        shift=_sum([effect.shift for effect in parts]),
    )


def _from_one(factors: Floats | None, weight: float) -> Floats | None:
    if factors is None or weight == 1.0:
        return factors
    return np.float32(1.0) + np.float32(weight) * (factors - np.float32(1.0))


def _product(factors: Sequence[Floats | None]) -> Floats | None:
    found: Floats | None = None
    for one in factors:
        found = one if found is None else found if one is None else found * one
    return found


def _mean(factors: Sequence[Floats | None]) -> Floats | None:
    """Of factors that have their weights already, each as a distance from one."""
    given = [one - np.float32(1.0) for one in factors if one is not None]
    return np.float32(1.0) + sum(given[1:], given[0]) if given else None


def _sum(terms: Sequence[Floats | None]) -> Floats | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _worded(op: str) -> str:
    return "a magnitude (DoRA)" if op in (LOWRANK, AFFINE) else f"the op {op}"
