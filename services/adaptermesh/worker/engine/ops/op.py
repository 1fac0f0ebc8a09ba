"""What the engine asks of an op, and the metadata of a step that every op shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.manifest_edges import is_around

TensorReader = Callable[[str], torch.Tensor]
"""Gives a canonical tensor by its name, in host memory or on its way to the device."""
HeadProduct = Callable[[torch.Tensor], torch.Tensor]
"""The base's head: [n, hidden] -> [n, vocabulary] float32."""

AROUND = "around"
"""The kind of what acts around the layers, whichever op does."""


def kind_of(module: ModuleOp) -> str:
    """Which of the engine's ops holds a module: the one of its kind, unless it acts around the layers."""
    return AROUND if is_around(module) else module.op


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens [start, end) of one slot; -1 is the base."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Consecutive tokens [start, end) of one sequence; the first is its token number `past`.

    `prompt`: tokens of its prompt. An adapter's virtual tokens are among none of these.
    """

    start: int
    end: int
    past: int
    prompt: int


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The adapters of a step's packed tokens. Built once a step, shared by all sites and layers.

    `segments` cover all tokens, in order. A slot may have several: one of decodes, one of prefills, and one
    of each prefill whose first tokens are the base's. `rows` are for ops that ask where in its sequence a
    token is; `outputs` are the tokens whose logits are wanted.
    """

    segments: tuple[Segment, ...]
    rows: tuple[RowTokens, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def active_slots(self) -> frozenset[int]:
        return frozenset(segment.slot for segment in self.segments if segment.slot >= 0)

    def outputs_of(self, slot: int) -> list[int]:
        """Which of the outputs are of a slot's tokens."""
        spans = [(segment.start, segment.end) for segment in self.segments if segment.slot == slot]
        return [
            place
            for place, token in enumerate(self.outputs)
            if any(start <= token < end for start, end in spans)
        ]


class SitePlan(Protocol):
    """One site's share of one step."""

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part. x: [tokens, in], the site's input. y: [tokens, out], changed in place."""
        ...


class InputPlan(Protocol):
    """What adapters do in one step to what goes into one site."""

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] -> what the site gets instead; x itself stays as it is."""
        ...


class BlockPlan(Protocol):
    """What adapters add in one step where one sub-layer's output joins the residual stream."""

    def term(
        self, layer: int, residual: torch.Tensor, output: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:
        """What to add to the stream. All: [tokens, hidden]; what is given stays as it is.

        `stream` is `residual + output` with what ops before this one have added.
        """
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


@runtime_checkable
class InputOp(Op, Protocol):
    """An op that also changes what goes into sites, in the order of `input_place` among such ops."""

    input_place: int

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        """By site; one whose input no active adapter changes is absent."""
        ...


@runtime_checkable
class BlockOp(Op, Protocol):
    """An op that acts beside sub-layers."""

    def plan_blocks(self, tokens: StepTokens) -> Mapping[str, BlockPlan]:
        """By block site; one that no active adapter touches is absent."""
        ...


@runtime_checkable
class EdgeOp(Op, Protocol):
    """An op that acts around the layers."""

    def embeds(self, tokens: StepTokens) -> bool:
        """Whether any of the tokens' adapters changes embeddings."""
        ...

    def embed(self, tokens: StepTokens, ids: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
        """Changes embeddings in place. ids: [tokens]. hidden: [tokens, hidden].

        `scale`: what the base multiplies its embeddings by.
        """
        ...

    def head(
        self,
        tokens: StepTokens,
        normed: Callable[[torch.Tensor], torch.Tensor],
        product: HeadProduct,
        logits: torch.Tensor,
    ) -> None:
        """Changes logits in place: [outputs, vocabulary], the base's.

        `normed` gives for some of the outputs, [n], what the base's head reads of them: [n, hidden].
        """
        ...


@runtime_checkable
class StreamOp(Op, Protocol):
    """An op that changes what goes into the first layer."""

    def enters(self, tokens: StepTokens) -> bool:
        """Whether any of the tokens' adapters changes it."""
        ...

    def enter(self, tokens: StepTokens, hidden: torch.Tensor) -> None:
        """hidden: [tokens, hidden], changed in place."""
        ...


class CapturedOp(Protocol):
    """An op's part of steps of one token a row, over buffers that stay where they are."""

    def plan(self, rows: int) -> Mapping[str, SitePlan]:
        """What the first `rows` rows do, by site, whatever the buffers hold when it is applied."""
        ...

    def fill(self, slots: Sequence[int], rows: int) -> None:
        """Writes a step: the slot of each of its rows, -1 for the base; none for the rows up to `rows`."""
        ...


@runtime_checkable
class CapturableOp(Op, Protocol):
    """An op that can be part of a recorded step."""

    @property
    def layout(self) -> int:
        """Differs after what makes an earlier capture wrong: memory that moved, a site's first adapter."""
        ...

    def rank_of(self, slots: Sequence[int]) -> int:
        """The largest rank of some slots, at any site."""
        ...

    def capture(self, rows: int, rank: int) -> CapturedOp | None:
        """Buffers for that many rows of at most that rank; None if this op can't be recorded here."""
        ...
