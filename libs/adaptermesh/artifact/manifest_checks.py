"""What must hold between the parts of a manifest."""

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptermesh.artifact.manifest_bottlenecks import wrong_bottleneck, wrong_groups
from adaptermesh.artifact.manifest_edges import what_is_wrong
from adaptermesh.artifact.manifest_parts import (
    HEADER_LAYER,
    MAX_CHUNK_BYTES,
    MAX_INVOCATION_TOKENS,
    MAX_VIRTUAL_TOKENS,
    SCHEMA,
    TENSOR_ALIGNMENT,
    TENSOR_DTYPES,
    Chunk,
    ModuleOp,
    TensorEntry,
    corrupt,
)
from adaptermesh.artifact.merging_recipe import check_kept_recipe
from adaptermesh.artifact.ops import (
    AFFINE,
    BOTTLENECK,
    BOTTLENECK_GROUP,
    FUSION,
    KV_PREFIX,
    LOWRANK,
    OPS,
    PROMPT,
    REFT,
    STRUCTURED,
)
from adaptermesh.artifact.sites import ATTENTION, EDGES, EMBED
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
    _check_activation(manifest)
    _check_summary(manifest)


def _check_identity(manifest: "Manifest") -> None:
    _need(manifest.schema == SCHEMA, "schema {!r} is not {!r}", manifest.schema[:80], SCHEMA)
    try:
        check_name(manifest.namespace, "namespace")
        check_name(manifest.name, "name")
        check_kept_recipe(manifest.parents, manifest.merge_recipe)
    except MeshError as error:
        raise corrupt(error.message) from None
    base = manifest.base
    for digest in (base.digest, base.config_digest, base.weights_digest, *manifest.same_as_base.values()):
        _need(is_digest(digest), "{!r} is not a digest", digest[:80])
    copied = set(manifest.same_as_base) - set(EDGES)
    _need(not copied, "same_as_base names {}, which is no such site", sorted(copied)[:4])
    _need(
        min(base.hidden_size, base.num_layers, base.vocab_size) > 0,
        "the base has a size that is not positive",
    )
    paths = Counter(file.path for file in manifest.source.files)
    for file in manifest.source.files:
        path = file.path[:80]
        good = is_digest(file.sha256) and file.size_bytes >= 0
        _need(good, "source file {!r} has a bad digest or size", path)
        _need(paths[file.path] == 1, "source file {!r} is listed twice", path)


def _check_chunks(chunks: Sequence[Chunk], size_bytes: int) -> None:
    _need(len(chunks) > 0 and chunks[0].layer == HEADER_LAYER, "the first chunk must hold the header")
    end, layer = 0, HEADER_LAYER
    for index, chunk in enumerate(chunks):
        _need(
            chunk.offset == end, "chunk {} begins at {}, the one before ends at {}", index, chunk.offset, end
        )
        sized = 1 <= chunk.size <= MAX_CHUNK_BYTES
        _need(sized, "chunk {} has {} bytes, not 1 to {}", index, chunk.size, MAX_CHUNK_BYTES)
        _need(is_digest(chunk.sha256), "chunk {} has no digest", index)
        _need(chunk.layer >= layer, "chunk {} is of layer {}, after layer {}", index, chunk.layer, layer)
        end, layer = chunk.offset + chunk.size, chunk.layer
    _need(end == size_bytes, "the chunks have {} bytes, the file has {}", end, size_bytes)


def _check_tensors(tensors: Sequence[TensorEntry], chunks: Sequence[Chunk]) -> Mapping[str, int]:
    """Returns the layer of each tensor: that of all chunks it lies in."""
    starts = [chunk.offset for chunk in chunks]
    file_end = chunks[-1].offset + chunks[-1].size
    layers: dict[str, int] = {}
    end = chunks[0].size if chunks else 0
    for tensor in tensors:
        name, offset, shape = tensor.name[:120], tensor.offset, tensor.shape
        _need(tensor.name not in layers, "tensor {!r} is listed twice", name)
        _need(tensor.dtype in TENSOR_DTYPES, "tensor {!r} has dtype {!r}", name, tensor.dtype[:20])
        _need(0 < len(shape) <= 8 and min(shape) > 0, "tensor {!r} has shape {}", name, shape[:8])
        size = math.prod(shape) * TENSOR_DTYPES[tensor.dtype]
        _need(tensor.size == size, "tensor {!r} has {} bytes, its shape needs {}", name, tensor.size, size)
        aligned = offset % TENSOR_ALIGNMENT == 0
        _need(aligned, "tensor {!r} begins at {}, which is not aligned", name, offset)
        _need(offset >= end, "tensor {!r} overlaps what is before it", name)
        end = offset + tensor.size
        _need(end <= file_end, "tensor {!r} ends at {}, past the end of the file at {}", name, end, file_end)
        first = chunks[bisect.bisect_right(starts, offset) - 1].layer
        last = chunks[bisect.bisect_right(starts, end - 1) - 1].layer
        _need(first == last, "tensor {!r} lies in chunks of layers {} to {}", name, first, last)
        layers[tensor.name] = first
    return layers


def _check_modules(manifest: "Manifest", layers: Mapping[str, int]) -> None:
    entries = {tensor.name: tensor for tensor in manifest.tensors}
    lowrank = {(m.site, m.layer, m.expert): m for m in manifest.modules if m.op == LOWRANK}
    unused = set(entries)
    seen: set[tuple[str, int, int | None, str, int]] = set()
    for module in manifest.modules:
        what = _Named(module)
        key = (module.site, module.layer, module.expert, module.op, module.member)
        _need(key not in seen, "{} is listed twice", what)
        seen.add(key)
        _need(0 <= module.layer < manifest.base.num_layers, "{} is outside of the base", what)
        scaled = math.isfinite(module.scale) and module.scale > 0
        _need(scaled, "{} has scale {}", what, module.scale)
        _check_slots(module, what)
        for name in module.tensors.values():
            short = name[:120]
            _need(name in unused, "{} needs tensor {!r}, which is absent or used twice", what, short)
            unused.remove(name)
            layer, dtype = layers[name], entries[name].dtype
            _need(layer == module.layer, "{} has tensor {!r} in chunks of layer {}", what, short, layer)
            _need(dtype == module.dtype, "{} has a tensor of dtype {}", what, dtype)
        shapes = {slot: entries[name].shape for slot, name in module.tensors.items()}
        wrong = what_is_wrong(module, shapes, manifest.base)
        _need(not wrong, "{} {}", what, wrong)
        if module.op == LOWRANK:
            _check_lowrank(module, entries, what)
        elif module.op in (BOTTLENECK, BOTTLENECK_GROUP, FUSION):
            _check_bottleneck(module, entries, manifest.base.hidden_size, what)
        elif module.op == STRUCTURED:
            _check_structured(module, entries, what)
        elif module.op == PROMPT:
            _check_prompt(module, entries, manifest.base.hidden_size, what)
        elif module.op == KV_PREFIX:
            _check_prefix(module, entries, what)
        elif module.op == REFT:
            _check_reft(module, entries, manifest.base.hidden_size, what)
        elif module.op == AFFINE:
            _check_affine(module, entries, what)
            if "magnitude" in module.tensors:
                _check_magnitude(module, lowrank.get((module.site, module.layer, module.expert)), what)
    for module, wrong in wrong_groups(manifest.modules):
        raise corrupt(f"{_Named(module)} {wrong}")
    _check_virtual(manifest, entries)
    chosen = [module.options for module in manifest.modules if module.op == REFT and module.options]
    ends = {(options["prefix"], options["suffix"]) for options in chosen}
    _need(len(ends) <= 1, "its modules act on other ends of a prompt: {}", sorted(ends)[:4])
    _need(not unused, "tensor {!r} belongs to no module", min(unused, default="")[:120])


def _check_slots(module: ModuleOp, what: "_Named") -> None:
    slots = _SLOTS.get(module.op)
    if slots is None:
        raise corrupt(f"{what}: there is no such op")
    needed, allowed = slots
    given = module.tensors.keys()
    _need(needed <= given <= allowed, "{} has slots {}", what, list(given)[:8])
    options, choices = module.options or {}, OPS[module.op].options
    _need(options.keys() == choices.keys(), "{} has options {}", what, list(options)[:8])
    for name, choice in options.items():
        _need(choice in choices[name], "{} has {} {!r}", what, name, choice[:40])


def _check_lowrank(module: ModuleOp, entries: Mapping[str, TensorEntry], what: "_Named") -> None:
    rank = module.rank
    a, b = entries[module.tensors["A"]].shape, entries[module.tensors["B"]].shape
    _need(rank >= 1, "{} has rank {}", what, rank)
    _need(len(a) == 2 and a[0] == rank, "{} has rank {} and A of shape {}", what, rank, a)
    _need(len(b) == 2 and b[1] == rank, "{} has rank {} and B of shape {}", what, rank, b)


def _check_structured(module: ModuleOp, entries: Mapping[str, TensorEntry], what: "_Named") -> None:
    shapes = {slot: entries[name].shape for slot, name in module.tensors.items()}
    _need(module.rank == 0, "{} has rank {}", what, module.rank)
    if "R" not in shapes:
        _need(shapes.keys() == {"w1", "w2"}, "{} has slots {}", what, sorted(shapes))
        for slot, shape in shapes.items():
            _need(len(shape) == 2, "{} has {} of shape {}", what, slot, shape)
        return
    _need(shapes.keys() <= {"R", "row_scale"}, "{} has slots {}", what, sorted(shapes))
    _need(module.scale == 1.0, "{} has scale {} for nothing", what, module.scale)
    shape = shapes["R"]
    _need(len(shape) == 4 and shape[2] == shape[3], "{} has R of shape {}", what, shape)
    # What a factor exchanges are halves of blocks, in groups of twice as many blocks as the factor before.
    paired = shape[3] % 2 == 0 and shape[1] % 2 ** min(shape[0] - 1, 64) == 0
    _need(shape[0] == 1 or paired, "{} has {} factors of {} blocks of {}", what, *shape[:3])
    scale = shapes.get("row_scale", (1,))
    _need(len(scale) == 1, "{} has row_scale of shape {}", what, scale)


def _check_bottleneck(
    module: ModuleOp, entries: Mapping[str, TensorEntry], hidden: int, what: "_Named"
) -> None:
    wrong = wrong_bottleneck(
        module, {slot: entries[name].shape for slot, name in module.tensors.items()}, hidden
    )
    _need(not wrong, "{} {}", what, wrong)


def _check_reft(module: ModuleOp, entries: Mapping[str, TensorEntry], hidden: int, what: "_Named") -> None:
    options, given = module.options or {}, module.tensors.keys()
    _need(module.site == "ffn", "{} is at no place for it", what)
    _need(module.scale == 1.0 and module.rank >= 1, "{} has scale {}", what, module.scale)
    own = {f"{slot}_suffix" for slot in ("R", "W", "b")} if "R_suffix" in given else set()
    _need(not own or options["suffix"] != "0", "{} has tensors for a suffix of none", what)
    shared = {"R", "W", "b"} if options["prefix"] != "0" or not own else set()
    _need(given == shared | own, "{} has slots {}", what, list(given)[:8])
    _need(options["prefix"] != "0" or options["suffix"] != "0", "{} acts on no token", what)
    for slot, name in module.tensors.items():
        shape = (module.rank,) if slot[0] == "b" else (module.rank, hidden)
        found = entries[name].shape
        _need(found == shape, "{} has {} of shape {}", what, slot, found)


def _check_prompt(module: ModuleOp, entries: Mapping[str, TensorEntry], hidden: int, what: "_Named") -> None:
    shape = entries[module.tensors["E"]].shape
    _need(module.site == EMBED and module.layer == 0, "{} is not at the embeddings", what)
    _need(len(shape) == 2 and shape[1] == hidden, "{} has E of shape {}", what, shape)
    _check_unscaled(module, shape[0], what)


def _check_prefix(module: ModuleOp, entries: Mapping[str, TensorEntry], what: "_Named") -> None:
    k, v = entries[module.tensors["k"]].shape, entries[module.tensors["v"]].shape
    _need(module.site == ATTENTION, "{} is not at the attention", what)
    _need(len(k) == 3 and k == v, "{} has k of shape {} and v of shape {}", what, k, v)
    _check_unscaled(module, k[1], what)


def _check_unscaled(module: ModuleOp, tokens: int, what: "_Named") -> None:
    _need(module.expert is None, "{} has an expert", what)
    _need(module.rank == 0, "{} has rank {}", what, module.rank)
    _need(module.scale == 1.0, "{} has scale {} for nothing", what, module.scale)
    _need(tokens <= MAX_VIRTUAL_TOKENS, "{} has {} virtual tokens", what, tokens)


def _check_virtual(manifest: "Manifest", entries: Mapping[str, TensorEntry]) -> None:
    """Virtual tokens are of one kind, and the same in every layer."""
    prompts = sum(module.op == PROMPT for module in manifest.modules)
    prefixes = [entries[m.tensors["k"]].shape for m in manifest.modules if m.op == KV_PREFIX]
    _need(not (prompts and prefixes), "it has virtual tokens of two kinds")
    options = {tuple((m.options or {}).items()) for m in manifest.modules if m.op == KV_PREFIX}
    whole = len(prefixes) in (0, manifest.base.num_layers) and max(len(set(prefixes)), len(options)) <= 1
    _need(whole, "its prefix is not the same in all layers")
    alone = manifest.activation is None or not (prompts or prefixes)
    _need(alone, "virtual tokens come before any activation")


def _check_affine(module: ModuleOp, entries: Mapping[str, TensorEntry], what: "_Named") -> None:
    _need(bool(module.tensors), "{} has no tensors", what)
    given = module.tensors.keys()
    _need(module.rank == 0, "{} has rank {}", what, module.rank)
    scaled = "bias_delta" in given or "magnitude" in given
    _need(scaled or module.scale == 1.0, "{} has scale {} for nothing", what, module.scale)
    for slot, name in module.tensors.items():
        _need(len(entries[name].shape) == 1, "{} has {} of shape {}", what, slot, entries[name].shape)


def _check_magnitude(module: ModuleOp, beside: ModuleOp | None, what: "_Named") -> None:
    """What it is the magnitude of is found by name: it must be there."""
    _need("out_scale" not in module.tensors, "{} has a magnitude and an out_scale", what)
    names = {slot: f"L{module.layer}.{module.site}.{slot}" for slot in ("A", "B")}
    found = beside is not None and dict(beside.tensors) == names
    _need(found, "{} has a magnitude, but not its low-rank part", what)


def _check_activation(manifest: "Manifest") -> None:
    if manifest.activation is None:
        return
    tokens, vocabulary = manifest.activation.invocation_tokens, manifest.base.vocab_size
    _need(manifest.servable, "a manifest that is not servable has an activation")
    counted = 1 <= len(tokens) <= MAX_INVOCATION_TOKENS
    _need(counted, "{} invocation tokens are not 1 to {}", len(tokens), MAX_INVOCATION_TOKENS)
    for token in tokens:
        _need(0 <= token < vocabulary, "invocation token {} is not below {}", token, vocabulary)


def _check_summary(manifest: "Manifest") -> None:
    ops = {module.op for module in manifest.modules}
    kinds = manifest.op_kinds
    _need(kinds == tuple(sorted(ops)), "op_kinds {} are not those of the modules", kinds[:8])
    rank = max((module.rank for module in manifest.modules), default=0)
    cost = manifest.cost
    _need(cost.max_rank == rank, "max_rank is {}, the modules have {}", cost.max_rank, rank)
    size = sum(tensor.size for tensor in manifest.tensors)
    _need(cost.device_bytes == size, "device_bytes is {}, the tensors have {}", cost.device_bytes, size)
    _need(manifest.servable != bool(manifest.unservable_reason), "servable and unservable_reason disagree")
    if manifest.servable:
        _need(bool(manifest.modules), "a servable manifest needs a module")
        _need(all(OPS[op].served for op in ops), "ops {} are not all served", sorted(ops))
    else:
        # A fusion is kept for compositions, which are servable.
        _need(ops <= {FUSION}, "a manifest that is not servable has modules")


@dataclass(frozen=True, slots=True)
class _Named:
    """How a problem names a module."""

    module: ModuleOp

    def __str__(self) -> str:
        module = self.module
        place = f"{module.op[:20]} at layer {module.layer} {module.site[:40]!r}"
        return f"{place} member {module.member}" if module.member else place


_SLOTS = {
    name: (frozenset(op.slots), frozenset(op.slots) | frozenset(op.optional)) for name, op in OPS.items()
}


def _need(condition: bool, otherwise: str, *values: object) -> None:
    """Raises with `otherwise`, filled in only then: a manifest has thousands of things to check."""
    if not condition:
        raise corrupt(otherwise.format(*values))
