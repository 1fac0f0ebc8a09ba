"""What an upload becomes: its ops, its canonical tensors, and where the bytes of each come from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest_parts import TENSOR_DTYPES, Activation, ModuleOp, TensorEntry
from adaptermesh.artifact.problems import Problems, Rejection, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.tensor_scan import read_blocks

MAX_EXPANDED_BYTES = 2 * 2**30
"""Of a method that becomes another one: a small upload must not fill the disk."""

Floats = npt.NDArray[np.float32]
Values = Callable[[BinaryIO], Floats]
"""Gives float32 values from the uploaded file."""
Blocks = Callable[[BinaryIO], Iterable[bytes]]
"""Gives a canonical tensor's bytes from the uploaded file, block by block."""
Entries = Mapping[str, TensorEntry]
"""The tensors of one module by slot."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A canonical tensor, and where its bytes come from."""

    spec: TensorSpec
    layer: int
    blocks: Blocks


Piece = tuple[ModuleOp, tuple[PlannedTensor, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an adapter becomes: its ops and its tensors, in the order of the canonical file.

    `deciding` names, for every module, the uploaded tensor that makes it do nothing when it is zero, and
    `decider` is what its library calls such a tensor; none where zeros do something. `unservable` is set, and
    all else empty, when the adapter acts where nothing is served yet; a fusion has both, which is served only
    with others. `composition` is the manifest's. `copies` are the uploaded copies of the base's own weights,
    by the site: a file and what of it.
    """

    modules: tuple[ModuleOp, ...] = ()
    tensors: tuple[PlannedTensor, ...] = ()
    deciding: tuple[str, ...] = ()
    decider: str = ""
    activation: Activation | None = None
    unservable: str = ""
    composition: Mapping[str, Any] | None = None
    copies: Mapping[str, tuple[str, TensorEntry]] = field(default_factory=dict)

    def with_pieces(self, pieces: Iterable[Piece]) -> "Plan":
        """This plan with more ops, all of it in the order of the layers; itself if it is not served."""
        if self.unservable:
            return self
        more = list(pieces)
        modules = (*self.modules, *(op for op, _ in more))
        tensors = (*self.tensors, *(tensor for _, parts in more for tensor in parts))
        return replace(
            self,
            modules=tuple(sorted(modules, key=lambda op: op.layer)),
            tensors=tuple(sorted(tensors, key=lambda tensor: tensor.layer)),
        )

    def bounded(self, becomes: str) -> "Plan":
        """This plan, or why it is not served if its tensors take more room than `MAX_EXPANDED_BYTES`."""
        size = sum(tensor.spec.size for tensor in self.tensors)
        if size <= MAX_EXPANDED_BYTES:
            return self
        return Plan(
            unservable=f"not served: as the {becomes} that it is it would have {size} bytes, "
            f"the most is {MAX_EXPANDED_BYTES}; train it with a lower rank or on fewer modules"
        )


def copied(offset: int, size: int) -> Blocks:
    """Bytes as they stand in the uploaded file."""
    return lambda file: read_blocks(file, offset, size)


def computed(values: Values) -> Blocks:
    """float32 values that are computed when they are written, so that one tensor at a time is in memory.

    They raise Rejection if they leave float32's range, as products of finite values can.
    """

    def blocks(file: BinaryIO) -> Iterable[bytes]:
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.ascontiguousarray(values(file), "<f4")
        if not np.isfinite(found).all():
            raise Rejection(["the products of its tensors are too large for float32"])
        return (found.tobytes(),)

    return blocks


def tensor_name(site: str, layer: int, slot: str) -> str:
    """The canonical name."""
    return f"L{layer}.{site}.{slot}"


def values_of(entry: TensorEntry) -> Values:
    """Reads an uploaded tensor as float32."""
    return lambda file: tensor_from_file(entry, file)


def check_entry(entry: TensorEntry, shape: Shape, why: str, problems: Problems) -> None:
    """Notes a dtype that is not served, or another shape than the one that `why` asks for."""
    what = f"tensor {shown(entry.name)}"
    if entry.dtype not in TENSOR_DTYPES:
        problems.add(f"{what} is {entry.dtype}, expected one of {', '.join(TENSOR_DTYPES)}")
    if entry.shape != shape:
        problems.add(f"{what} has shape {list(entry.shape)}, expected {list(shape)}: {why}")


def check_one_dtype(module: str, entries: Entries, problems: Problems) -> None:
    """Notes a module whose tensors are of several dtypes."""
    if len({entry.dtype for entry in entries.values()}) > 1:
        names = " and ".join(sorted(entries))
        problems.add(f"module {shown(module)} has {names} of different dtypes; save all in one")
