"""The canonical form, applied by hand to the plain base, computes what the `adapters` library computes.

No engine here: hooks on a transformers model do what FORMATS says of each op, so that this proves the ingest
alone. The library's own numbers are in `goldens/`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32
from adaptermesh.artifact.manifest import Manifest, ModuleOp
from adaptermesh.artifact.sites import BLOCKS, Site, SiteMap, site_map
from tests.parity.adapters.goldens import (
    BASES,
    TOLERANCE,
    Goldens,
    ingest_folder,
    load_goldens,
    served_methods,
)

Tensors = dict[str, torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
}
# The modules of a layer where a block begins, by their norms, and where its output joins the stream.
_LLAMA_BLOCKS = {
    "attention": ("input_layernorm", "self_attn.o_proj"),
    "ffn": ("post_attention_layernorm", "mlp.down_proj"),
}
BLOCK_MODULES = {
    "llama": _LLAMA_BLOCKS,
    "mistral": _LLAMA_BLOCKS,
    "gpt2": {"attention": ("ln_1", "attn.c_proj"), "ffn": ("ln_2", "mlp.c_proj")},
}


def read_tensors(manifest: Manifest, path: Path) -> Tensors:
    with open_buffer(path) as buffer:
        return {
            entry.name: torch.from_numpy(to_float32(entry, tensor_view(entry, buffer)).copy())
            for entry in manifest.tensors
        }


def weight_of(module: Any, site: Site) -> torch.Tensor:
    """[out, in] of the site alone."""
    weight = module.weight.T if site.transposed else module.weight
    rows: torch.Tensor = weight[site.out_offset : site.out_offset + site.out_features]
    return rows


def site_hook(
    module: Any, site: Site, ops: list[ModuleOp], tensors: Tensors
) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    """y = out_scale * (W x + b + s B A x), the site's rows of it; of a DoRA b stays out of the product."""

    def hook(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        rows = slice(site.out_offset, site.out_offset + site.out_features)
        y = output[..., rows]
        bias = module.bias[rows] if module.bias is not None else torch.zeros(())
        delta = torch.zeros(())
        for op in ops:
            slots = {slot: tensors[name] for slot, name in op.tensors.items()}
            if op.op == "lowrank":
                delta = slots["B"] @ slots["A"]
                y = y + op.scale * inputs[0] @ delta.T
            elif "out_scale" in slots:
                y = y * slots["out_scale"]
            else:
                norm = (weight_of(module, site) + op.scale * delta).norm(dim=1)
                y = (y - bias) * slots["magnitude"] / norm + bias
        return torch.cat([output[..., : rows.start], y, output[..., rows.stop :]], dim=-1)

    return hook


def block_hooks(
    ops: list[ModuleOp], tensors: Tensors
) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, torch.Tensor], torch.Tensor]]:
    """Of the ops of one kind at a place; r is what the block's norm reads, h the sub-layer's output."""
    stream: list[torch.Tensor] = []

    def before(_: Any, inputs: Any) -> None:
        stream[:] = [inputs[0]]

    def after(_: Any, inputs: Any, h: torch.Tensor) -> torch.Tensor:
        (r,) = stream
        if ops[0].op == "reft":
            (slots,) = (slots_of(op, tensors) for op in ops)
            return h + intervention(dict(ops[0].options or {}), slots, r + h)
        for step in steps_of(ops):
            h = h + step_term(step, tensors, r, h)
        return h

    return before, after


def coupling_hook(op: ModuleOp, tensors: Tensors) -> Callable[[Any, Any], Any]:
    """The halves a and b of the stream before the first layer: a + F(b), then b + G of that."""
    slots = {slot: tensors[name] for slot, name in op.tensors.items()}
    activation = ACTIVATIONS[dict(op.options or {})["activation"]]

    def net(name: str, x: torch.Tensor) -> torch.Tensor:
        inner = activation(x @ slots[f"{name}_down"].T + slots[f"{name}_down_bias"])
        return inner @ slots[f"{name}_up"].T + slots[f"{name}_up_bias"]

    def hook(_: Any, inputs: Any) -> Any:
        a, b = inputs[0].tensor_split([inputs[0].shape[-1] // 2], -1)
        a = a + net("F", b)
        return (torch.cat([a, b + net("G", a)], -1), *inputs[1:])

    return hook


def slots_of(op: ModuleOp, tensors: Tensors) -> Tensors:
    return {slot: tensors[name] for slot, name in op.tensors.items()}


def steps_of(ops: list[ModuleOp]) -> list[list[ModuleOp]]:
    """The bottlenecks at one place in the steps in which they act."""
    steps: list[list[ModuleOp]] = []
    for op in ops:
        if (op.options or {}).get("step") == "same":
            steps[-1].append(op)
        else:
            steps.append([op])
    return steps


def step_term(step: list[ModuleOp], tensors: Tensors, r: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """scale * (up act(down v + down_bias) + up_bias) of one, or of several what their fusion makes of it."""
    ups = []
    for op in step:
        slots, options = slots_of(op, tensors), op.options or {}
        v = {"output": h, "sum": r + h, "residual": r}[options["input"]]
        inner = ACTIVATIONS[options["activation"]](v @ slots["down"].T + slots["down_bias"])
        ups.append(op.scale * (inner @ slots["up"].T + slots["up_bias"]))
    fusion = slots_of(step[0], tensors)
    if "query" not in fusion:
        return ups[0]
    query = v @ fusion["query"].T + fusion["query_bias"]
    keys = [up @ fusion["key"].T + fusion["key_bias"] for up in ups]
    shares = torch.stack([(query * key).sum(-1) for key in keys]).softmax(0)
    values = [up @ fusion["value"].T for up in ups] if "value" in fusion else ups
    return sum((share[..., None] * value for share, value in zip(shares, values, strict=True)), h * 0)


def intervention(options: dict[str, str], slots: Tensors, x: torch.Tensor) -> torch.Tensor:
    """R^T (act(W x + b) - R x) for the first and the last tokens. x: [1, tokens, hidden]."""
    found = torch.zeros_like(x)
    tokens = x.shape[1]
    ends = {
        "": range(min(tokens, int(options["prefix"]))),
        "_suffix": range(max(0, tokens - int(options["suffix"])), tokens),
    }
    for end, places in ends.items():
        part = list(places)
        if not part:
            continue
        names = (f"{slot}{end}" for slot in "RWb")
        r, w, b = (slots[name if name in slots else name[0]] for name in names)
        inner = ACTIVATIONS[options["activation"]](x[:, part] @ w.T + b)
        if options["subtract"] == "yes":
            inner = inner - x[:, part] @ r.T
        found[:, part] = inner @ r
    return found


@contextmanager
def applied(model: Any, kind: str, manifest: Manifest, sites: SiteMap, tensors: Tensors) -> Iterator[None]:
    """Hooks every op of a manifest in."""
    hooks = []
    at_sites: dict[tuple[str, int], list[ModuleOp]] = {}
    at_blocks: dict[tuple[str, int, str], list[ModuleOp]] = {}
    for op in manifest.modules:
        if op.op == "kv_prefix":
            # Not a hook: it is in the cache before the prompt.
            continue
        if op.op == "coupling":
            first = model.get_submodule(sites.layer_path.replace("{layer}", "0"))
            hooks.append(first.register_forward_pre_hook(coupling_hook(op, tensors)))
        elif op.site in BLOCKS:
            at_blocks.setdefault((op.site, op.layer, op.op), []).append(op)
        else:
            at_sites.setdefault((op.site, op.layer), []).append(op)
    for (name, number, _), ops in at_blocks.items():
        layer = model.get_submodule(sites.layer_path.replace("{layer}", str(number)))
        norm, last = BLOCK_MODULES[kind][name]
        before, after = block_hooks(ops, tensors)
        hooks.append(layer.get_submodule(norm).register_forward_pre_hook(before))
        hooks.append(layer.get_submodule(last).register_forward_hook(after))
    for (name, number), ops in at_sites.items():
        site = sites.get(name)
        assert site is not None
        module = model.get_submodule(site.module.replace("{layer}", str(number)))
        hooks.append(module.register_forward_hook(site_hook(module, site, ops, tensors)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, goldens: Goldens, tensors: Tensors | None = None) -> torch.Tensor:
    """Of the last position of each prompt; `tensors` may hold keys and values to see in front of it."""
    found = []
    for ids in goldens.prompts:
        cache = DynamicCache()
        for layer in range(len(tensors or {})):
            keys, values = (f"L{layer}.attention.{slot}" for slot in "kv")
            if tensors is not None and keys in tensors:
                cache.update(tensors[keys][None], tensors[values][None], layer)
        positions = torch.arange(len(ids))[None]
        with torch.no_grad():
            out = model(torch.tensor([ids]), past_key_values=cache, position_ids=positions)
        found.append(out.logits[0, -1])
    return torch.stack(found)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        kind: AutoModelForCausalLM.from_pretrained(
            load_goldens(kind).base_folder, attn_implementation="eager"
        ).eval()
        for kind in BASES
    }


@pytest.mark.parametrize("kind", BASES)
def test_the_base_computes_the_same_in_both_versions_of_transformers(
    models: dict[str, Any], kind: str
) -> None:
    goldens = load_goldens(kind)
    expected = torch.tensor(goldens.logits["base"])
    torch.testing.assert_close(logits(models[kind], goldens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("kind", "method"), served_methods())
def test_the_canonical_form_computes_what_the_library_does(
    models: dict[str, Any], tmp_path: Path, kind: str, method: str
) -> None:
    goldens = load_goldens(kind)
    manifest = ingest_folder(goldens.folder(method), goldens.facts, tmp_path / "canonical")
    assert manifest.servable, manifest.unservable_reason
    tensors = read_tensors(manifest, tmp_path / "canonical")
    with applied(models[kind], kind, manifest, site_map(goldens.facts), tensors):
        found = logits(models[kind], goldens, tensors)
    expected = torch.tensor(goldens.logits[method])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    # Of the rounding, not of the adapter, the tolerance is a small part.
    assert (expected - torch.tensor(goldens.logits["base"])).abs().amax() > 100 * TOLERANCE
