"""What ops share that compute segment by segment, each with its own adapter's tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import StepTokens


class HeldModule(Protocol):
    """What one adapter has at one site of one layer."""

    @property
    def tensors(self) -> Iterable[torch.Tensor]: ...


_Held = TypeVar("_Held", bound=HeldModule)


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
