"""What must hold between the parts of a manifest."""

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adaptermesh.artifact.manifest_parts import (
    HEADER_LAYER,
    MAX_CHUNK_BYTES,
    SCHEMA,
    TENSOR_ALIGNMENT,
    TENSOR_DTYPES,
    Chunk,
    ModuleOp,
    TensorEntry,
    corrupt,
)
from adaptermesh.artifact.ops import LOWRANK, OPS
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import MeshError
from adaptermesh.core.refs import check_name

if TYPE_CHECKING:
    from adaptermesh.artifact.manifest import Manifest


def check_manifest(manifest: "Manifest") -> None:
    """Checks a manifest that was read from bytes.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT) with what is wrong.
    """
    _check_identity(manifest)
    _check_chunks(manifest.chunks, manifest.size_bytes)
    layers = _check_tensors(manifest.tensors, manifest.chunks)
    _check_modules(manifest, layers)
    _check_summary(manifest)


def _check_identity(manifest: "Manifest") -> None:
    _need(manifest.schema == SCHEMA, f"schema {manifest.schema[:80]!r} is not {SCHEMA!r}")
    try:
        check_name(manifest.namespace, "namespace")
        check_name(manifest.name, "name")
    except MeshError as error:
        raise corrupt(error.message) from None
    base = manifest.base
    for digest in (base.digest, base.config_digest, base.weights_digest, *manifest.parents):
        _need(is_digest(digest), f"{digest[:80]!r} is not a digest")
    _need(
        min(base.hidden_size, base.num_layers, base.vocab_size) > 0,
        "the base has a size that is not positive",
    )
    paths = Counter(file.path for file in manifest.source.files)
    for file in manifest.source.files:
        _need(
            is_digest(file.sha256) and file.size_bytes >= 0,
            f"source file {file.path[:80]!r} has a bad digest or size",
        )
        _need(paths[file.path] == 1, f"source file {file.path[:80]!r} is listed twice")


def _check_chunks(chunks: Sequence[Chunk], size_bytes: int) -> None:
    _need(len(chunks) > 0 and chunks[0].layer == HEADER_LAYER, "the first chunk must hold the header")
    end, layer = 0, HEADER_LAYER
    for index, chunk in enumerate(chunks):
        _need(chunk.offset == end, f"chunk {index} begins at {chunk.offset}, the one before ends at {end}")
        _need(
            1 <= chunk.size <= MAX_CHUNK_BYTES,
            f"chunk {index} has {chunk.size} bytes, not 1 to {MAX_CHUNK_BYTES}",
        )
        _need(is_digest(chunk.sha256), f"chunk {index} has no digest")
        _need(chunk.layer >= layer, f"chunk {index} is of layer {chunk.layer}, after layer {layer}")
        end, layer = chunk.offset + chunk.size, chunk.layer
    _need(end == size_bytes, f"the chunks have {end} bytes, the file has {size_bytes}")


def _check_tensors(tensors: Sequence[TensorEntry], chunks: Sequence[Chunk]) -> Mapping[str, int]:
    """Returns the layer of each tensor: that of all chunks it lies in."""
    starts = [chunk.offset for chunk in chunks]
    file_end = chunks[-1].offset + chunks[-1].size
    layers: dict[str, int] = {}
    end = chunks[0].size if chunks else 0
    for tensor in tensors:
        what = f"tensor {tensor.name[:120]!r}"
        _need(tensor.name not in layers, f"{what} is listed twice")
        _need(tensor.dtype in TENSOR_DTYPES, f"{what} has dtype {tensor.dtype[:20]!r}")
        _need(0 < len(tensor.shape) <= 8 and min(tensor.shape) > 0, f"{what} has shape {tensor.shape[:8]}")
        size = math.prod(tensor.shape) * TENSOR_DTYPES[tensor.dtype]
        _need(tensor.size == size, f"{what} has {tensor.size} bytes, its shape needs {size}")
        _need(
            tensor.offset % TENSOR_ALIGNMENT == 0, f"{what} begins at {tensor.offset}, which is not aligned"
        )
        _need(tensor.offset >= end, f"{what} overlaps what is before it")
        end = tensor.offset + tensor.size
        _need(end <= file_end, f"{what} ends at {end}, past the end of the file at {file_end}")
        first = chunks[bisect.bisect_right(starts, tensor.offset) - 1].layer
        last = chunks[bisect.bisect_right(starts, end - 1) - 1].layer
        _need(first == last, f"{what} lies in chunks of layers {first} to {last}")
        layers[tensor.name] = first
    return layers


def _check_modules(manifest: "Manifest", layers: Mapping[str, int]) -> None:
    entries = {tensor.name: tensor for tensor in manifest.tensors}
    unused = set(entries)
    seen: set[tuple[str, int, int | None, str]] = set()
    for module in manifest.modules:
        what = f"{module.op[:20]} at layer {module.layer} {module.site[:40]!r}"
        key = (module.site, module.layer, module.expert, module.op)
        _need(key not in seen, f"{what} is listed twice")
        seen.add(key)
        _need(0 <= module.layer < manifest.base.num_layers, f"{what} is outside of the base")
        _need(math.isfinite(module.scale) and module.scale > 0, f"{what} has scale {module.scale}")
        _check_slots(module, what)
        for name in module.tensors.values():
            _need(name in unused, f"{what} needs tensor {name[:120]!r}, which is absent or used twice")
            unused.remove(name)
            _need(
                layers[name] == module.layer,
                f"{what} has tensor {name[:120]!r} in chunks of layer {layers[name]}",
            )
            _need(entries[name].dtype == module.dtype, f"{what} has a tensor of dtype {entries[name].dtype}")
        if module.op == LOWRANK:
            _check_lowrank(module, entries, what)
    _need(not unused, f"tensor {min(unused, default='')[:120]!r} belongs to no module")


def _check_slots(module: ModuleOp, what: str) -> None:
    op = OPS.get(module.op)
    _need(op is not None, f"{what}: there is no such op")
    if op is not None:
        given = set(module.tensors)
        _need(
            set(op.slots) <= given <= set(op.slots) | set(op.optional),
            f"{what} has slots {sorted(given)[:8]}",
        )


def _check_lowrank(module: ModuleOp, entries: Mapping[str, TensorEntry], what: str) -> None:
    a, b = entries[module.tensors["A"]].shape, entries[module.tensors["B"]].shape
    _need(module.rank >= 1, f"{what} has rank {module.rank}")
    _need(len(a) == 2 and a[0] == module.rank, f"{what} has rank {module.rank} and A of shape {a}")
    _need(len(b) == 2 and b[1] == module.rank, f"{what} has rank {module.rank} and B of shape {b}")


def _check_summary(manifest: "Manifest") -> None:
    ops = {module.op for module in manifest.modules}
    _need(
        manifest.op_kinds == tuple(sorted(ops)),
        f"op_kinds {manifest.op_kinds[:8]} are not those of the modules",
    )
    rank = max((module.rank for module in manifest.modules), default=0)
    _need(manifest.cost.max_rank == rank, f"max_rank is {manifest.cost.max_rank}, the modules have {rank}")
    size = sum(tensor.size for tensor in manifest.tensors)
    _need(
        manifest.cost.device_bytes == size,
        f"device_bytes is {manifest.cost.device_bytes}, the tensors have {size}",
    )
    _need(manifest.servable != bool(manifest.unservable_reason), "servable and unservable_reason disagree")
    if manifest.servable:
        _need(bool(manifest.modules), "a servable manifest needs a module")
        _need(all(OPS[op].served for op in ops), f"ops {sorted(ops)} are not all served")
    else:
        _need(not manifest.modules, "a manifest that is not servable has modules")


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise corrupt(otherwise)
