"""Adapters into an op, whole; and into an op and its twin alike."""

from collections.abc import Mapping, Sequence

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.ops.op import Op, TensorReader


def load(op: Op, slot: int, modules: Sequence[ModuleOp], read: TensorReader, layers: int) -> None:
    """Layer by layer, as slots do."""
    op.reserve(slot, modules)
    for layer in range(layers):
        op.load_layer(slot, layer, [module for module in modules if module.layer == layer], read)


class Twins:
    """An op and its plain twin, with the same adapters in the slots `held`."""

    def __init__(self, fast: Op, plain: Op, layers: int) -> None:
        self.ops = fast, plain
        self.held: set[int] = set()
        self._layers = layers

    def hold(self, slot: int, modules: Sequence[ModuleOp], tensors: Mapping[str, torch.Tensor]) -> None:
        for op in self.ops:
            op.unload(slot)
            load(op, slot, modules, tensors.__getitem__, self._layers)
        self.held.add(slot)

    def unload(self, slot: int) -> None:
        for op in self.ops:
            op.unload(slot)
        self.held.discard(slot)


class NoWeights:
    """A base of which an op asks nothing but what a test adds."""

    def squares(self, site: Site, layer: int) -> torch.Tensor:
        raise NotImplementedError

    def project(self, site: Site, layer: int, a: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def bias(self, site: Site, layer: int) -> torch.Tensor | None:
        raise NotImplementedError

    def norm(self, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        raise NotImplementedError
