"""What a request and an adapter must be before this engine takes them."""

import math
from collections.abc import Mapping

import torch

from adaptermesh.artifact.manifest import BaseRef, Manifest, ModuleOp, TensorEntry
from adaptermesh.artifact.manifest_edges import is_around
from adaptermesh.artifact.ops import (
    BOTTLENECK,
    BOTTLENECK_GROUP,
    KV_PREFIX,
    LOWRANK,
    REFT,
    REPLACE,
    STRUCTURED,
)
from adaptermesh.artifact.sites import LAYER_NORMS, STREAM, Site
from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch, invalid_field
from adaptermesh.core.priority import check_priority
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.host_arena import corrupt
from adaptermesh.worker.engine.ops.registry import OP_KINDS
from adaptermesh.worker.engine.ops.virtual import WITHOUT_SITES
from adaptermesh.worker.engine.request import Request
from adaptermesh.worker.engine.slots import check_servable


def check_adapter(digest: str, manifest: Manifest, base: Base) -> None:
    """Checks a manifest against the base model.

    Raises:
        MeshError: FAILED_PRECONDITION (BASE_MISMATCH, ADAPTER_UNSUPPORTED); DATA_LOSS (DATA_CORRUPT) if a
            module doesn't fit the base, which no store should have let in.
    """
    if manifest.base.digest != base.facts.digest:
        raise base_mismatch(f"{manifest.namespace}/{manifest.name}", manifest.base.digest, base.facts.digest)
    _check_sizes(digest, manifest.base, base)
    check_servable(digest, manifest, OP_KINDS)
    _check_copies(digest, manifest, base)
    entries = {entry.name: entry for entry in manifest.tensors}
    for module in manifest.modules:
        if is_around(module) or module.site in (STREAM, *LAYER_NORMS):
            # Their shapes, by the sizes of the base, are among the manifest's own checks.
            if module.site not in (STREAM, *base.sites.edges, *base.sites.norms):
                raise corrupt(digest, f"the base has no site {module.site}")
            continue
        if module.op in WITHOUT_SITES:
            _check_virtual(digest, module, entries, base)
            continue
        site = base.sites.get(module.site)
        if module.op in (BOTTLENECK, BOTTLENECK_GROUP, REFT) and module.site in base.sites.blocks:
            # Their shapes, by the hidden size, are among the manifest's own checks.
            continue
        if site is None or not 0 <= module.layer < base.sites.num_layers:
            raise corrupt(digest, f"the base has no site {module.site} in layer {module.layer}")
        found = {slot: entries[name].shape for slot, name in module.tensors.items() if name in entries}
        shapes = _structured(found, site) if module.op == STRUCTURED else _shapes(module, site)
        for slot, name in module.tensors.items():
            entry = entries.get(name)
            if entry is None or entry.shape != shapes.get(slot):
                problem = f"is not {list(shapes.get(slot, ()))}"
                raise corrupt(digest, f"{slot} of {module.site} in layer {module.layer} {problem}")


def _check_sizes(digest: str, described: BaseRef, base: Base) -> None:
    """The manifest's own checks are of the sizes that it says its base has: they must be this base's."""
    facts = base.facts
    sizes = (facts.hidden_size, facts.num_layers, facts.vocab_size)
    found = (described.hidden_size, described.num_layers, described.vocab_size)
    if found != sizes:
        raise corrupt(digest, f"it says that its base has the sizes {list(found)}, they are {list(sizes)}")


def _check_copies(digest: str, manifest: Manifest, base: Base) -> None:
    """What was uploaded as a copy of the base's own weights, and dropped for it, must be just that."""
    for site, expected in manifest.same_as_base.items():
        if base.edge_digest(site) != expected:
            path = base.sites.edges[site].module
            raise MeshError(
                Code.FAILED_PRECONDITION,
                Reason.ADAPTER_UNSUPPORTED,
                f"adapter {digest} can't be served: it came with a weight of {path} that is not the base's; "
                "if that was trained, say so in its config (peft: modules_to_save), if not, save it without",
                metadata={"digest": digest},
            )


def _check_virtual(digest: str, module: ModuleOp, entries: Mapping[str, TensorEntry], base: Base) -> None:
    """What the manifest's own checks don't say: shapes agree, and every layer of the base has its part."""
    for slot, name in module.tensors.items():
        shape = entries[name].shape
        expected: tuple[int, ...] = (shape[0], base.facts.hidden_size)
        if module.op == KV_PREFIX:
            expected = (base.kv_heads, shape[1], base.head_dim)
        if shape != expected:
            raise corrupt(digest, f"{slot} of {module.op} in layer {module.layer} is not {list(expected)}")


def _shapes(module: ModuleOp, site: Site) -> Mapping[str, tuple[int, ...]]:
    """What the tensors of a module have to be, by slot; the manifest's own checks say which it has."""
    if module.op == LOWRANK:
        return {"A": (module.rank, site.in_features), "B": (site.out_features, module.rank)}
    outputs = (site.out_features,)
    if module.op == REPLACE:
        return {"weight": (site.out_features, site.in_features), "bias": outputs}
    return {
        "in_scale": (site.in_features,),
        "out_scale": outputs,
        "bias_delta": outputs,
        "magnitude": outputs,
    }


def _structured(found: Mapping[str, tuple[int, ...]], site: Site) -> Mapping[str, tuple[int, ...]]:
    """What the tensors of a structured op have to be if its second matrix, or its blocks, are those found."""
    inputs, outputs = site.in_features, site.out_features
    if "w2" in found:
        o2, i2 = found["w2"][0], math.gcd(found["w2"][1], inputs)
        rows = -(-(site.out_offset + outputs) // o2) - site.out_offset // o2
        return {"w1": (rows, inputs // i2), "w2": (o2, i2)}
    factors, count, block = found.get("R", (1, 1, 1, 1))[:3]
    block = math.gcd(block, inputs)
    count = inputs // block if count > 1 else 1
    return {"R": (factors, count, block, block), "row_scale": (outputs,)}


def device_bytes_of(manifest: Manifest, dtype: torch.dtype) -> int:
    """What an adapter's weights take on a device that computes in a dtype."""
    return sum(math.prod(tensor.shape) for tensor in manifest.tensors) * dtype.itemsize


def check_request(request: Request, vocab_size: int, max_context_tokens: int) -> None:
    """Checks a request's own values; raises MeshError INVALID_ARGUMENT (INVALID_FIELD, PROMPT_TOO_LONG)."""
    sampling = request.sampling.check()
    if not all(token < vocab_size for token in sampling.stop_token_ids):
        raise invalid_field("sampling.stop_token_ids", f"ids must be in [0, {vocab_size})")
    check_priority(request.priority)
    if request.deadline_ns < 0:
        raise invalid_field("deadline_ns", "must not be negative")
    if not request.prompt_ids:
        raise invalid_field("input", "the prompt is empty")
    if not all(0 <= token < vocab_size for token in request.prompt_ids):
        raise invalid_field("input.token_ids", f"ids must be in [0, {vocab_size})")
    if len(request.prompt_ids) >= max_context_tokens:
        raise prompt_too_long(request, 0, max_context_tokens)


def prompt_too_long(request: Request, virtual: int, max_context_tokens: int) -> MeshError:
    """`virtual`: tokens that the request's adapter puts in front of the prompt."""
    count = len(request.prompt_ids)
    before = f" and the adapter puts {virtual} in front of it" if virtual else ""
    return MeshError(
        Code.INVALID_ARGUMENT,
        Reason.PROMPT_TOO_LONG,
        f"the prompt has {count} tokens{before}; with at least one token of output that must fit into "
        f"{max_context_tokens}",
        metadata={"prompt_tokens": str(count), "max_context_tokens": str(max_context_tokens)},
    )
