"""What ops share that compute segment by segment, each with its own adapter's tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import BlockPlan, SitePlan, StepTokens, TensorReader


class HeldModule(Protocol):
    """What one adapter has at one site of one layer."""

    @property
    def tensors(self) -> Iterable[torch.Tensor]: ...


class HeldTerm(HeldModule, Protocol):
    """One that adds to the stream."""

    def term(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What it adds; all [tokens, hidden]."""
        ...


_Held = TypeVar("_Held", bound=HeldModule)
_Term = TypeVar("_Term", bound=HeldTerm)


class SegmentOp(Generic[_Held]):
    """Keeps the modules of all slots by site and layer."""

    def __init__(self) -> None:
        self._held: dict[int, dict[tuple[str, int], _Held]] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """Takes no room before the tensors come."""

    def unload(self, slot: int) -> None:
        self._held.pop(slot, None)

    @property
    def size_bytes(self) -> int:
        modules = (module for held in self._held.values() for module in held.values())
        return sum(tensor.nbytes for module in modules for tensor in module.tensors)

    def hold(self, slot: int, site: str, layer: int, module: _Held) -> None:
        self._held.setdefault(slot, {})[site, layer] = module

    def sites(self, tokens: StepTokens, acts: Callable[[_Held], bool] = lambda _: True) -> set[str]:
        """The sites at which an adapter of the step has a module that acts."""
        held = (one for slot in tokens.active_slots for one in self._held.get(slot, {}).items())
        return {site for (site, _), module in held if acts(module)}

    def parts(self, tokens: StepTokens, site: str, layer: int) -> Iterator[tuple[slice, _Held]]:
        """The segments of a step whose adapter has a module there: their rows, and the module."""
        for segment in tokens.segments:
            module = self._held.get(segment.slot, {}).get((site, layer))
            if module is not None:
                yield slice(segment.start, segment.end), module


class CopyingSegmentOp(SegmentOp[_Held]):
    """One that keeps its tensors on a device, in one dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._dtype = dtype
        self._device = device

    def copier(self, read: TensorReader) -> TensorReader:
        """Gives copies that the op may keep."""
        return lambda name: read(name).to(self._device, self._dtype, copy=True)


class SegmentBlockOp(CopyingSegmentOp[_Term]):
    """One that acts beside sub-layers alone, and reads what goes into them and comes out of them."""

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (it has no part at a site)
        return {}

    def plan_blocks(self, tokens: StepTokens) -> Mapping[str, BlockPlan]:
        return {block: _BlockPlan(self, block, tokens) for block in self.sites(tokens)}


@dataclass(frozen=True, slots=True)
class _BlockPlan(Generic[_Term]):
    op: SegmentBlockOp[_Term]
    block: str
    tokens: StepTokens

    def term(
        self,
        layer: int,
        residual: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor,  # noqa: ARG002 (an adapter has one op of this kind at a place)
    ) -> torch.Tensor:
        found = torch.zeros_like(output)
        for rows, module in self.op.parts(self.tokens, self.block, layer):
            found[rows] = module.term(residual[rows], output[rows])
        return found
