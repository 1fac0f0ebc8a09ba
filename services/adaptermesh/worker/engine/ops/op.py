"""What the engine asks of an op, and the metadata of a step that every op shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adaptermesh.artifact.manifest import ModuleOp

TensorReader = Callable[[str], torch.Tensor]
"""Gives a canonical tensor by its name, in host memory."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens [start, end) of one slot; -1 is the base."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The adapters of a step's packed tokens. Built once a step, shared by all sites and layers.

    `segments` cover all tokens, in order. A slot may have two segments: one of decodes, one of prefills.
    """

    segments: tuple[Segment, ...]

    @property
    def active_slots(self) -> frozenset[int]:
        return frozenset(segment.slot for segment in self.segments if segment.slot >= 0)


class SitePlan(Protocol):
    """One site's share of one step."""

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part. x: [tokens, in], the site's input. y: [tokens, out], changed in place."""
        ...


class Op(Protocol):
    """Holds one kind of op for all slots on one device."""

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """Gives an adapter the room that its modules of this kind take in a slot that is empty."""
        ...

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        """Copies the tensors of one layer, those of `modules`, into a reserved slot; there may be none."""
        ...

    def unload(self, slot: int) -> None:
        """Empties a slot; one that is empty stays so."""
        ...

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        """What to do in a step, by site; a site that no active adapter touches is absent."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        ...
