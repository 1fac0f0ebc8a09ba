"""An adapter into an op, whole."""

from collections.abc import Sequence

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import Op, TensorReader


def load(op: Op, slot: int, modules: Sequence[ModuleOp], read: TensorReader, layers: int) -> None:
    """Layer by layer, as slots do."""
    op.reserve(slot, modules)
    for layer in range(layers):
        op.load_layer(slot, layer, [module for module in modules if module.layer == layer], read)
