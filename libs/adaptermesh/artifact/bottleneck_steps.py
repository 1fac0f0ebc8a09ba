"""Bottlenecks at one block site of one layer, in the steps in which they act. All in float32.

What is in one step reads the same: bottlenecks side by side, whose widths are put together, or those that a
fusion weighs for each token. The next step reads what is there after it, unless it reads the residual.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import BOTTLENECK, BOTTLENECK_GROUP, NEXT, SAME
from adaptermesh.artifact.plan import Floats
from adaptermesh.core.errors import Code, MeshError, Reason

Written = Iterator[tuple[ModuleOp, Mapping[str, Floats]]]
"""Modules, each with its tensors by slot."""

_OWN = ("down", "down_bias", "up", "up_bias")


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """`scale * (up act(down v + down_bias) + up_bias)`. down: [width, hidden]. up: [hidden, width]."""

    down: Floats
    down_bias: Floats
    up: Floats
    up_bias: Floats
    scale: float
    activation: str
    input: str


@dataclass(frozen=True, slots=True)
class Step:
    """What acts at once, with `fusing` tensors (query, key and more; see the op table) as a fusion does.

    Without them the parts add up, and have the same activation and input.
    """

    parts: tuple[Bottleneck, ...]
    fusing: Mapping[str, Floats] | None = None

    @property
    def input(self) -> str:
        return self.parts[0].input

    def scaled(self, weight: float) -> "Step":
        """Each part times a weight, or what the fusion makes of them: its value is linear, it has no bias."""
        if self.fusing is None:
            return Step(tuple(replace(part, scale=part.scale * weight) for part in self.parts))
        value = self.fusing.get("value")
        if value is None:
            value = np.eye(len(self.fusing["query"]), dtype=np.float32)
        return replace(self, fusing={**self.fusing, "value": np.float32(weight) * value})

    def goes_beside(self, other: "Step") -> bool:
        """Whether the two are one step if both read the same values."""
        kinds = {(part.activation, part.input) for part in (*self.parts, *other.parts)}
        return self.fusing is None and other.fusing is None and len(kinds) == 1


def steps_of(modules: Sequence[ModuleOp], read: Callable[[str], Floats]) -> tuple[Step, ...]:
    """The steps of one adapter's bottlenecks at one place; `read` gives their tensors."""
    found: list[Step] = []
    for module in modules:
        options, tensors = module.options or {}, {slot: read(name) for slot, name in module.tensors.items()}
        own = {slot: tensors.pop(slot) for slot in _OWN}
        part = Bottleneck(**own, scale=module.scale, activation=options["activation"], input=options["input"])
        if options.get("step") == SAME:
            found[-1] = replace(found[-1], parts=(*found[-1].parts, part))
        else:
            found.append(Step((part,), tensors or None))
    return tuple(found)


def weighted(steps: Sequence[Step], weight: float) -> tuple[Step, ...]:
    """All that the steps add, times a weight.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) if one reads what another adds, which then has
            to stay as it is.
    """
    if any(step.input != "residual" for step in steps[1:]):
        raise untaken(
            "bottlenecks in a row, of which one reads what another adds, have no weight or share together: "
            "give each of them a weight of its own, in a stack"
        )
    return tuple(step.scaled(weight) for step in steps)


def in_a_row(members: Sequence[Sequence[Step]]) -> tuple[Step, ...]:
    """The members' steps one after the other; those that read the residual side by side where they can be."""
    found: list[Step] = []
    for step in (step for steps in members for step in steps):
        if found and step.input == "residual" and found[-1].goes_beside(step):
            found[-1] = Step((*found[-1].parts, *step.parts))
        else:
            found.append(step)
    return tuple(found)


def side_by_side(members: Sequence[Sequence[Step]]) -> tuple[Step, ...]:
    """One step of the members' steps, each of which has one or none and reads the same as the others.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for any others.
    """
    steps = [step for steps in members for step in steps]
    if len(steps) < 2:
        return tuple(steps)
    if any(len(steps) > 1 for steps in members) or any(step.fusing is not None for step in steps):
        raise untaken("bottlenecks in a row or fused have no mean with others: stack them")
    if not all(steps[0].goes_beside(step) for step in steps):
        raise untaken(
            "two bottlenecks at one place that read differently or have other activations: stack them"
        )
    return (Step(tuple(part for step in steps for part in step.parts)),)


def written(layer: int, site: str, steps: Sequence[Step]) -> Written:
    """The steps as modules: one bottleneck, or a group."""
    if len(steps) == 1 and steps[0].fusing is None:
        values, options = _joined(steps[0].parts)
        yield _module(layer, site, BOTTLENECK, values, options), values
        return
    member = 0
    for step in steps:
        fusing = step.fusing or {}
        together = [step.parts] if step.fusing is None else [(part,) for part in step.parts]
        for number, parts in enumerate(together):
            values, options = _joined(parts)
            values |= {} if number else fusing
            options["step"] = SAME if number else NEXT
            yield _module(layer, site, BOTTLENECK_GROUP, values, options, member), values
            member += 1


def _joined(parts: Sequence[Bottleneck]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Bottlenecks side by side as one, with their scales in it: its tensors and options."""
    biases = [np.float32(part.scale) * part.up_bias for part in parts]
    values = {
        "down": np.concatenate([part.down for part in parts]),
        "down_bias": np.concatenate([part.down_bias for part in parts]),
        "up": np.concatenate([np.float32(part.scale) * part.up for part in parts], axis=1),
        "up_bias": sum(biases[1:], biases[0]),
    }
    return values, {"activation": parts[0].activation, "input": parts[0].input}


def _module(
    layer: int, site: str, op: str, values: Mapping[str, Floats], options: Mapping[str, str], member: int = 0
) -> ModuleOp:
    own = f"{site}.{member}" if op == BOTTLENECK_GROUP else site
    names = {slot: f"L{layer}.{own}.{slot}" for slot in values}
    return ModuleOp(site, layer, op, 0, 1.0, names, "F32", options=options, member=member)


def untaken(why: str) -> MeshError:
    """A composition that has no exact form."""
    return MeshError(
        Code.FAILED_PRECONDITION, Reason.ADAPTER_UNSUPPORTED, f"this composition can't be served: {why}"
    )
