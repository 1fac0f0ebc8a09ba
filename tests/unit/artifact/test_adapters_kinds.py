"""Every kind that the adapters library saves: what its manifest holds, and the values of its tensors."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from adaptermesh.artifact.base_copies import rounded_digest
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32, verify_file
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import MeshError, Reason
from tests.parity.adapters.goldens import ROOT, ingest_folder, load_goldens, served_methods

BASES = ("llama", "gpt2")
FACTS: dict[str, BaseFacts] = {base: load_goldens(base).facts for base in BASES}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}
BLOCKS = {"attention": "attention_adapters", "ffn": "output_adapters"}

FFN = [("ffn", 0), ("ffn", 1)]
BOTH = [("attention", 0), ("ffn", 0), ("attention", 1), ("ffn", 1)]
# By method: the places in order, activation, input, scale of each, inner widths.
BOTTLENECKS: dict[str, tuple[list[tuple[str, int]], str, str, list[float] | None, list[int]]] = {
    "seq_bn": (FFN, "relu", "sum", [1.0] * 2, [8] * 2),
    "seq_bn_inv": (FFN, "relu", "sum", [1.0] * 2, [8] * 2),
    "seq_bn_by_layer": (FFN, "tanh", "sum", [1.0] * 2, [1, 12]),
    "seq_bn_left_out": ([("ffn", 1)], "leaky_relu", "sum", [1.0], [8]),
    "adapter_plus": (FFN, "gelu", "sum", [1.0] * 2, [8] * 2),
    "double_seq_bn": (BOTH, "silu", "output", [1.0] * 4, [8] * 4),
    "par_bn": (FFN, "relu", "residual", [4.0] * 2, [16] * 2),
    "scaled_par_bn": (FFN, "relu", "residual", None, [8] * 2),
    "negative_par_bn": (BOTH, "gelu_new", "residual", [1.0, 1.0, float(np.float32(1.3)), 1.0], [8] * 4),
    "compacter": (BOTH, "gelu", "output", [1.0] * 4, [8] * 4),
    "compacter_pp": (FFN, "gelu", "sum", [1.0] * 2, [8] * 2),
    "compacter_own_rules": (BOTH, "gelu", "output", [1.0] * 4, [8] * 4),
    "compacter_shared": (BOTH, "gelu", "output", [1.0] * 4, [8] * 4),
    "with_class_head": (FFN, "relu", "sum", [1.0] * 2, [4] * 2),
}
COUPLED = ("seq_bn_inv",)
LORAS: dict[tuple[str, str], tuple[str, list[str], int, float]] = {
    ("llama", "lora"): ("lora", ["q", "v"], 4, 2.5),
    ("gpt2", "lora"): ("lora", ["q", "v"], 4, 2.5),
    ("llama", "lora_everywhere"): ("lora", ["q", "k", "v", "up", "down"], 3, 1.0),
    ("gpt2", "lora_everywhere"): ("lora", ["q", "k", "v", "up", "down"], 3, 1.0),
    ("llama", "vera"): ("vera", ["q"], 4, 1.5),
    ("gpt2", "vera"): ("vera", ["up"], 4, 1.5),
    ("llama", "dora"): ("dora", ["q", "v"], 4, 1.0),
    ("llama", "dora_scaled"): ("dora", ["q", "v"], 4, 2.5),
    ("llama", "dvora"): ("dvora", ["q"], 4, 1.0),
}
DIGESTS = {
    ("llama", "seq_bn"): "sha256:8ea1f232144c9ca0c69d1e884e1cdf790dd95f3f10aaa4c2c927df69dcacebe6",
    ("llama", "adapter_plus"): "sha256:4cfdd98b62bbd6c852cefd79883770dcebfb2c1e61f96dd2513279c2701d7a30",
    ("llama", "compacter"): "sha256:f242279439e80dba08540eec25cef96cd7a102fd1869d2ce6868dbea8f967be0",
    (
        "llama",
        "compacter_own_rules",
    ): "sha256:6c0e98f4e8cce05df3b89cc4cf20c415e4db9932bd9cc1b697e6ce0f5085fccf",
    ("llama", "seq_bn_inv"): "sha256:93adfeb10922aebb73b0956fa0a7f3c510d7af5829b0f0c7ead208805eeddc5f",
    ("llama", "dora_scaled"): "sha256:64cd0796b493dd6a5c43ce95e8170fa249b405c9dad1235400e7988119a8bc3d",
    ("llama", "vera"): "sha256:a66109b5d2be85c7f150ad6c0ac88b15a972dc3d82bd5929db093322f1177403",
    ("llama", "dora"): "sha256:e4f160fa3373d3d9df6b4e1d66fb930ab7b4330b71af6da811d045cad5e3e8d1",
    ("llama", "ia3"): "sha256:6f9d2f0745d96839e9336a38674b7b4f43c91a1c54d409ac4b1909d4cf8805ea",
    ("llama", "with_class_head"): "sha256:f291049f7852ec5d8ac2a2fcd0fb8289a4128979a591894eb4b3b368efa213f8",
    ("llama", "mam"): "sha256:875842b53427fbffa82ce2d99ec3e6588a2cd1ccd8631a6a9ea7c1f105da3a77",
    ("llama", "fuse_dynamic"): "sha256:67712ee9e109fd425ce0746e30a868750f3a1d3344a0d98613146df3321fcb67",
    ("llama", "stack_seq_bn"): "sha256:8ad8ba273800fa849012d9bffa47162a0f01d971669bb3033e2c04bb02d66b55",
    ("llama", "fusion"): "sha256:be2e9cc230225847cbfee6101ba1c537dc171c20efa1017c1f333490406ca030",
    ("gpt2", "fuse_static"): "sha256:cc38b167ed30ccca338e212e0b473de771e2460e8a88931b0941d2745c863cf4",
    ("gpt2", "lora"): "sha256:a579252b89e0edbef3533e6d92e4af5454f85c55df7c0d7e1c77c2a9e61e4ba8",
}


def read(base: str, method: str, tmp_path: Path) -> tuple[Manifest, dict[str, npt.NDArray[np.float32]]]:
    """The manifest and every canonical tensor."""
    manifest = ingest_folder(ROOT / base / method, FACTS[base], tmp_path / "canonical")
    with open_buffer(tmp_path / "canonical") as buffer:
        verify_file(manifest, buffer)
        tensors = {
            entry.name: to_float32(entry, tensor_view(entry, buffer)).copy() for entry in manifest.tensors
        }
    return manifest, tensors


def source(base: str, method: str) -> dict[str, npt.NDArray[np.float32]]:
    """The uploaded tensors."""
    return load_file(ROOT / base / method / "adapter.safetensors")


def test_every_served_golden_is_among_the_kinds_tested_here() -> None:
    tested = {("llama", name) for name in BOTTLENECKS} | {("gpt2", name) for name in BOTTLENECKS} | set(LORAS)
    ia3 = {(base, name) for base in BASES for name in ("ia3", "ia3_everywhere")}
    refts = {(base, name) for base in BASES for name in REFTS}
    prefixes = {(base, name) for base in BASES for name in PREFIXES}
    unions = {(base, name) for base in BASES for name in UNIONS}
    sets = {(base, name) for base in BASES for name in SETS}
    known = tested | ia3 | refts | prefixes | unions | sets
    assert {found for found in served_methods() if found[0] in BASES} <= known


# Rank, tokens at both ends, layers, whether the last tokens have tensors of their own, kind, activation.
REFTS: dict[str, tuple[int, int, int, list[int], bool, str, str]] = {
    "loreft": (1, 3, 0, [0, 1], False, "loreft", "linear"),
    "loreft_both_ends": (3, 2, 4, [0, 1], True, "loreft", "linear"),
    "loreft_tied": (2, 3, 2, [0, 1], False, "loreft", "gelu"),
    "loreft_last": (1, 0, 1, [1], True, "loreft", "linear"),
    "noreft_told": (2, 3, 1, [0, 1], True, "noreft", "linear"),
    "direft_told": (2, 3, 1, [0, 1], True, "direft", "linear"),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", REFTS)
def test_a_reft_becomes_one_op_for_each_layer(tmp_path: Path, base: str, method: str) -> None:
    rank, prefix, suffix, layers, own, kind, activation = REFTS[method]
    manifest, tensors = read(base, method, tmp_path)
    assert (manifest.servable, manifest.kind, manifest.op_kinds) == (True, kind, ("reft",))
    assert [(module.site, module.layer, module.rank) for module in manifest.modules] == [
        ("ffn", layer, rank) for layer in layers
    ]
    for module in manifest.modules:
        assert module.options == {
            "activation": activation,
            "subtract": "no" if kind == "direft" else "yes",
            "prefix": str(prefix),
            "suffix": str(suffix),
        }
        assert ("R_suffix" in module.tensors, "R" in module.tensors) == (own, prefix > 0)
        if kind == "loreft":
            r = tensors[module.tensors["R" if prefix else "R_suffix"]]
            np.testing.assert_allclose(r @ r.T, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers": [0, 2]}, "layers names 2"),
        ({"layers": [0]}, "asks for nothing there"),
        ({"r": 2}, "expected \\[2, 32\\]"),
        ({"orthogonality": False, "subtract_projection": True}, "but no units.0.projection.weight"),
        ({"tied_weights": True}, "units.1"),
        ({"prefix_positions": 0}, "act on no token"),
        ({"prefix_positions": -1}, "prefix_positions"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_reft_that_its_file_or_the_base_contradicts_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        read_changed("loreft", change, tmp_path)
    assert caught.value.reason is Reason.ADAPTER_REJECTED


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"non_linearity": "mish"}, "non_linearity 'mish'"),
        ({"output_reft": False}, "output_reft false"),
        ({"prefix_positions": 5000}, "more than 1024 tokens"),
    ],
)
def test_a_reft_that_is_not_served_is_stored(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    manifest = read_changed("loreft", change, tmp_path)
    assert not manifest.servable
    assert why in manifest.unservable_reason


PREFIXES = {"prefix_tuning": 3, "prefix_tuning_flat": 11}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", PREFIXES)
def test_a_prefix_becomes_keys_and_values_of_every_layer(tmp_path: Path, base: str, method: str) -> None:
    manifest, tensors = read(base, method, tmp_path)
    assert (manifest.servable, manifest.kind, manifest.op_kinds) == (True, "prefix_tuning", ("kv_prefix",))
    assert [(module.site, module.layer) for module in manifest.modules] == [
        ("attention", 0),
        ("attention", 1),
    ]
    assert all(module.options == {"positions": "start"} for module in manifest.modules)
    stored = load_file(ROOT / base / method / "adapter.safetensors")
    own = {key.partition("self_prefix.")[2]: value.astype(np.float64) for key, value in stored.items()}
    if method == "prefix_tuning":
        inner = np.tanh(own["wte.weight"] @ own["control_trans.0.weight"].T + own["control_trans.0.bias"])
        values = inner @ own["control_trans.2.weight"].T + own["control_trans.2.bias"]
    else:
        values = own["control_trans"]
    heads, dim = (2, 8) if base == "llama" else (4, 8)
    parts = values.reshape(PREFIXES[method], 4, heads, dim)
    for layer in range(2):
        for number, slot in enumerate("kv"):
            found = tensors[f"L{layer}.attention.{slot}"]
            np.testing.assert_allclose(found, parts[:, 2 * layer + number].transpose(1, 0, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prefix_length": 4}, "from the config"),
        ({"bottleneck_size": 9}, "from the config"),
        ({"flat": True}, "but no self_prefix"),
        ({"prefix_length": 0}, "prefix_length"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_prefix_that_its_file_contradicts_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        read_changed("prefix_tuning", change, tmp_path)
    assert caught.value.reason is Reason.ADAPTER_REJECTED


def test_copies_of_a_prefix_that_differ_are_refused(tmp_path: Path) -> None:
    goldens = load_goldens("llama")
    folder = tmp_path / "changed"
    shutil.copytree(goldens.folder("prefix_tuning_flat"), folder)
    stored = load_file(folder / "adapter.safetensors")
    last = max(stored)
    stored[last] = stored[last] + np.float32(1.0)
    save_file(stored, folder / "adapter.safetensors")
    with pytest.raises(MeshError, match="they are one tensor"):
        ingest_folder(folder, goldens.facts, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_gating": True}, "use_gating"),
        ({"leave_out": [0]}, "leave_out"),
        ({"non_linearity": "gelu"}, "served with tanh or relu"),
    ],
)
def test_a_prefix_that_is_not_served_is_stored(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    manifest = read_changed("prefix_tuning", change, tmp_path)
    assert not manifest.servable
    assert why in manifest.unservable_reason


UNIONS = {
    "mam": ["attention kv_prefix", "ffn bottleneck"],
    "union": ["q lowrank", "v lowrank", "attention bottleneck", "ffn bottleneck", "ffn reft"],
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", UNIONS)
def test_a_union_has_the_ops_of_all_its_methods_layer_by_layer(
    tmp_path: Path, base: str, method: str
) -> None:
    manifest, _ = read(base, method, tmp_path)
    assert (manifest.servable, manifest.kind) == (True, "union")
    assert [(module.layer, f"{module.site} {module.op}") for module in manifest.modules] == [
        (layer, module) for layer in range(2) for module in UNIONS[method]
    ]


@pytest.mark.parametrize(
    ("configs", "why"),
    [
        ([], "no list of 1 to 16"),
        ([3], "no config of a method"),
        ([{"architecture": "union", "configs": []}], "no config of a method"),
        ([{"architecture": "lora", "r": 2, "alpha": 4}], "the config asks for no such part"),
    ],
)
def test_a_union_that_its_file_contradicts_is_refused(tmp_path: Path, configs: Any, why: str) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        read_changed("mam", {"configs": configs}, tmp_path)
    assert caught.value.reason is Reason.ADAPTER_REJECTED


def test_a_union_of_two_methods_of_one_container_is_stored(tmp_path: Path) -> None:
    loras = [{"architecture": "lora", "r": 2, "alpha": 4}] * 2
    manifest = read_changed("union", {"configs": loras}, tmp_path)
    assert "several methods that keep their tensors in 'loras'" in manifest.unservable_reason


def read_changed(method: str, change: dict[str, Any], tmp_path: Path) -> Manifest:
    """A golden of the llama with other values in its method's config."""
    goldens = load_goldens("llama")
    folder = tmp_path / "changed"
    shutil.copytree(goldens.folder(method), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"].update(change)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ingest_folder(folder, goldens.facts, tmp_path / "out")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", BOTTLENECKS)
def test_a_bottleneck_becomes_one_op_for_each_block(tmp_path: Path, base: str, method: str) -> None:
    places, activation, reads, scales, widths = BOTTLENECKS[method]
    manifest, tensors = read(base, method, tmp_path)
    assert manifest.servable
    modules = [op for op in manifest.modules if op.op == "bottleneck"]
    assert manifest.op_kinds == (("bottleneck", "coupling") if method in COUPLED else ("bottleneck",))
    assert [(op.site, op.layer) for op in modules] == places
    for op, width in zip(modules, widths, strict=True):
        assert dict(op.options or {}) == {"activation": activation, "input": reads}
        assert tensors[f"L{op.layer}.{op.site}.down"].shape == (width, 32)
        assert dict(op.tensors) == {
            slot: f"L{op.layer}.{op.site}.{slot}" for slot in ("down", "down_bias", "up", "up_bias")
        }
    if scales is not None:
        assert [op.scale for op in modules] == scales


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "negative_par_bn"])
def test_a_plain_bottleneck_keeps_its_values_and_the_sign_of_its_scale(
    tmp_path: Path, base: str, method: str
) -> None:
    manifest, tensors = read(base, method, tmp_path)
    uploaded = source(base, method)
    for op in manifest.modules:
        prefix = f"{LAYERS[base]}.{op.layer}.{BLOCKS[op.site]}.adapters.task_1."
        scale = uploaded.get(f"{prefix}scaling", np.array([4.0 if method == "par_bn" else 1.0]))
        found = {slot: tensors[name] for slot, name in op.tensors.items()}
        np.testing.assert_array_equal(found["down"], uploaded[f"{prefix}adapter_down.0.weight"])
        np.testing.assert_array_equal(found["down_bias"], uploaded[f"{prefix}adapter_down.0.bias"])
        for slot, name in (("up", "weight"), ("up_bias", "bias")):
            expected = scale * uploaded[f"{prefix}adapter_up.{name}"]
            np.testing.assert_allclose(op.scale * found[slot], expected, rtol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_a_scale_for_each_channel_is_multiplied_into_the_rows_of_up(tmp_path: Path, base: str) -> None:
    _, tensors = read(base, "adapter_plus", tmp_path)
    uploaded = source(base, "adapter_plus")
    prefix = f"{LAYERS[base]}.1.output_adapters.adapters.task_1."
    scale = uploaded[f"{prefix}scaling"]
    assert (scale < 0).any()
    np.testing.assert_array_equal(
        tensors["L1.ffn.up"], scale[:, None] * uploaded[f"{prefix}adapter_up.weight"]
    )
    np.testing.assert_array_equal(tensors["L1.ffn.up_bias"], scale * uploaded[f"{prefix}adapter_up.bias"])


def kron_sum(rule: npt.NDArray[Any], weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    total = np.sum([np.kron(r, w) for r, w in zip(rule, weight, strict=True)], axis=0)
    return np.asarray(total).T


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["compacter", "compacter_pp", "compacter_own_rules", "compacter_shared"])
def test_compacter_is_multiplied_out(tmp_path: Path, base: str, method: str) -> None:
    manifest, tensors = read(base, method, tmp_path)
    uploaded = source(base, method)
    shared = f"{LAYERS[base].partition('.')[0]}.shared_parameters.task_1."

    def product(name: str) -> npt.NDArray[Any]:
        if name in uploaded:
            return uploaded[name]
        return np.asarray(uploaded[f"{name}_left"] @ uploaded[f"{name}_right"])

    for op in manifest.modules:
        own = f"{LAYERS[base]}.{op.layer}.{BLOCKS[op.site]}.adapters.task_1."
        for slot, layer in (("down", "adapter_down.0."), ("up", "adapter_up.")):
            rule = product(
                f"{own}{layer}phm_rule" if method == "compacter_own_rules" else f"{shared}phm_rule"
            )
            name = f"{shared}W_{slot}" if method == "compacter_shared" else f"{own}{layer}W"
            expected = kron_sum(rule, product(name))
            np.testing.assert_allclose(tensors[op.tensors[slot]], expected, rtol=1e-5, atol=1e-6)
            bias = uploaded.get(f"{own}{layer}b", np.zeros(len(expected), np.float32))
            np.testing.assert_array_equal(tensors[op.tensors[f"{slot}_bias"]], bias)
        assert op.dtype == "F32"


@pytest.mark.parametrize(("base", "method"), LORAS)
def test_the_lora_family_becomes_lowrank_with_its_scale(tmp_path: Path, base: str, method: str) -> None:
    kind, sites, rank, scale = LORAS[base, method]
    manifest, tensors = read(base, method, tmp_path)
    assert manifest.kind == kind
    lowrank = [op for op in manifest.modules if op.op == "lowrank"]
    assert [(op.site, op.layer) for op in lowrank] == [(site, layer) for layer in (0, 1) for site in sites]
    assert {(op.rank, op.scale) for op in lowrank} == {(rank, scale)}
    magnitudes = [op for op in manifest.modules if op.op == "affine"]
    assert {(op.site, op.layer) for op in magnitudes} == (
        {(op.site, op.layer) for op in lowrank} if "do" in kind or kind == "dvora" else set()
    )
    for op in magnitudes:
        (name,) = op.tensors.values()
        # The norm is of W + B A, whatever the sum's own scale.
        assert op.scale == 1.0
        path = f"model.layers.{op.layer}.self_attn.{op.site}_proj.loras.task_1.m.weight"
        np.testing.assert_array_equal(tensors[name], source(base, method)[path][:, 0])


def test_fused_attention_is_split_into_the_parts_that_were_chosen(tmp_path: Path) -> None:
    manifest, tensors = read("gpt2", "lora", tmp_path)
    uploaded = source("gpt2", "lora")
    for op in manifest.modules:
        place = ["q", "v"].index(op.site)
        path = f"transformer.h.{op.layer}.attn.c_attn.loras.task_1."
        np.testing.assert_array_equal(
            tensors[op.tensors["A"]], uploaded[f"{path}lora_A"][4 * place : 4 * place + 4]
        )
        np.testing.assert_array_equal(
            tensors[op.tensors["B"]], uploaded[f"{path}lora_B"][32 * place : 32 * place + 32]
        )


def test_vera_multiplies_whole_matrices_into_the_shared_ones(tmp_path: Path) -> None:
    _, tensors = read("llama", "vera", tmp_path)
    uploaded = source("llama", "vera")
    own, shared = "model.layers.1.self_attn.q_proj.loras.task_1.", "model.shared_parameters.task_1."
    for slot, left, right in (("A", "vera_D", "lora_A"), ("B", "vera_B", "lora_B")):
        expected = uploaded[own + left] @ uploaded[shared + right]
        np.testing.assert_allclose(tensors[f"L1.q.{slot}"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "method", "expected"),
    [
        # Llama's "intermediate" is down_proj, whose output is scaled; its "output" is up_proj.
        ("llama", "ia3", [("k", 16), ("v", 16), ("down", 32)]),
        ("llama", "ia3_everywhere", [("q", 32), ("v", 16), ("up", 48), ("down", 32)]),
        ("gpt2", "ia3", [("k", 32), ("v", 32), ("up", 48)]),
        ("gpt2", "ia3_everywhere", [("q", 32), ("v", 32), ("up", 48), ("down", 32)]),
    ],
)
def test_ia3_scales_outputs_where_its_tensors_are(
    tmp_path: Path, base: str, method: str, expected: list[tuple[str, int]]
) -> None:
    manifest, tensors = read(base, method, tmp_path)
    assert manifest.kind == "ia3"
    layers = (0,) if method == "ia3_everywhere" else (0, 1)
    found = [(op.site, op.layer, len(tensors[op.tensors["out_scale"]])) for op in manifest.modules]
    assert found == [(site, layer, width) for layer in layers for site, width in expected]
    if base == "gpt2" and method == "ia3":
        uploaded = source(base, method)["transformer.h.0.attn.c_attn.loras.task_1.lora_B"][:, 0]
        np.testing.assert_array_equal(tensors["L0.k.out_scale"], uploaded[:32])
        np.testing.assert_array_equal(tensors["L0.v.out_scale"], uploaded[32:])


@pytest.mark.parametrize(
    ("method", "kind", "why"),
    [
        ("seq_bn_glow", "bottleneck", "inv_adapter 'glow': of the invertible adapters only 'nice' is served"),
        ("seq_bn_gated", "bottleneck", "use_gating: a learned gate on each bottleneck"),
        ("seq_bn_ln_before", "bottleneck", "a layer norm of its own"),
        ("seq_bn_ln_after", "bottleneck", "a layer norm of its own"),
        ("seq_bn_twice_residual", "bottleneck", "which add the residual stream twice"),
        ("bn_without_residual", "bottleneck", "which add the residual stream not at all"),
        ("seq_bn_mish", "bottleneck", "non_linearity 'mish'"),
        ("lora_gated", "lora", "use_gating: a learned gate in place of alpha/r"),
        ("mtl_lora", "mtl_lora", "MTL-LoRA"),
        ("noreft", "noreft", "NoReFT and DiReFT are saved alike"),
        ("direft", "noreft", "NoReFT and DiReFT are saved alike"),
        ("unipelt", "union", "in a union, prefix_tuning: use_gating"),
    ],
)
def test_what_is_not_served_is_stored_with_the_reason(
    tmp_path: Path, method: str, kind: str, why: str
) -> None:
    manifest, _ = read("llama", method, tmp_path)
    assert not manifest.servable
    assert "not served yet: " in manifest.unservable_reason
    assert why in manifest.unservable_reason
    assert (manifest.kind, manifest.modules, manifest.tensors) == (kind, (), ())


# By layer and site: the steps in which bottlenecks act, each with how many of them; a fusion is marked.
SETS: dict[str, tuple[str, Iterable[str], list[str]]] = {
    "fuse_dynamic": ("fuse", ("ffn",), ["f2", "f3"]),
    "fuse_static": ("fuse", BLOCKS, ["f2", "f2"]),
    "fuse_late_value": ("fuse", ("ffn",), ["f2", "f2"]),
    "stack_seq_bn": ("stack", ("ffn",), ["1 1", "1 1 1"]),
    "stack_double_seq_bn": ("stack", BLOCKS, ["1 1", "1 1"]),
    "stack_on_fuse": ("stack", ("ffn",), ["1 f1", "1 f2"]),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", SETS)
def test_a_set_up_of_bottlenecks_becomes_groups(tmp_path: Path, base: str, method: str) -> None:
    kind, sites, layers = SETS[method]
    manifest, tensors = read(base, method, tmp_path)
    assert (manifest.servable, manifest.kind, manifest.op_kinds) == (True, kind, ("bottleneck_group",))
    for layer, expected in enumerate(layers):
        for site in sites:
            steps: list[str] = []
            for op in (op for op in manifest.modules if (op.layer, op.site) == (layer, site)):
                assert ("value" in op.tensors) == ("query" in op.tensors and method != "fuse_static")
                assert all(name in tensors for name in op.tensors.values())
                if (op.options or {})["step"] == "same":
                    steps[-1] = f"f{int(steps[-1][1:]) + 1}"
                else:
                    steps.append("f1" if "query" in op.tensors else "1")
            assert " ".join(steps) == expected


@pytest.mark.parametrize(("base", "method"), DIGESTS)
def test_a_kind_has_the_same_digest_everywhere(tmp_path: Path, base: str, method: str) -> None:
    assert read(base, method, tmp_path)[0].digest == DIGESTS[base, method]


@pytest.mark.parametrize(
    ("method", "sites"),
    [("lora_everywhere", ["q", "k", "v", "up", "down"]), ("ia3", ["k", "v", "up"]), ("double_seq_bn", [])],
)
def test_an_encoders_lora_is_read_and_its_bottlenecks_stored(
    tmp_path: Path, method: str, sites: list[str]
) -> None:
    folder = ROOT / "bert" / method
    config = json.loads((ROOT / "bert" / "base" / "config.json").read_text())
    facts = BaseFacts.from_config("golden", config, "sha256:" + "0" * 64)
    manifest = ingest_folder(folder, facts, tmp_path / "canonical")
    assert [(op.site, op.layer) for op in manifest.modules] == [
        (site, layer) for layer in (0, 1) for site in sites
    ]
    reason = "not served yet: bottlenecks in a BertForMaskedLM, after its layer norms"
    assert manifest.unservable_reason == ("" if sites else reason)


def test_the_manifest_names_the_library_its_version_and_its_config(tmp_path: Path) -> None:
    manifest, _ = read("llama", "seq_bn", tmp_path)
    assert manifest.source.format == "adapters"
    assert dict(manifest.source.library_versions) == {"adapters": "1.3.0"}
    assert manifest.source.config["name"] == "task_1"
    assert [file.path for file in manifest.source.files] == ["adapter.safetensors", "adapter_config.json"]
    assert manifest.head is None
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_a_classification_head_is_described_and_the_adapter_served_without_it(tmp_path: Path) -> None:
    manifest, _ = read("llama", "with_class_head", tmp_path)
    assert manifest.servable
    head = dict(manifest.head or {})
    tensors = {tensor["name"]: tensor["shape"] for tensor in head.pop("tensors")}
    assert head == {
        "type": "classification",
        "name": "task_1",
        "num_labels": 3,
        "labels": ["good", "bad", "other"],
        "file": "model_head.safetensors",
    }
    assert tensors == {
        "heads.task_1.1.weight": [32, 32],
        "heads.task_1.1.bias": [32],
        "heads.task_1.4.weight": [3, 32],
        "heads.task_1.4.bias": [3],
    }


def test_an_lm_head_that_is_tied_to_the_embeddings_is_the_bases_own(tmp_path: Path) -> None:
    manifest, _ = read("gpt2", "with_lm_head", tmp_path)
    assert manifest.servable
    assert (manifest.head or {})["type"] == "lm_head"
    assert not manifest.same_as_base


def test_an_lm_head_that_is_not_tied_has_to_be_the_bases(tmp_path: Path) -> None:
    manifest, _ = read("llama", "with_lm_head", tmp_path)
    assert manifest.servable
    head = load_file(ROOT / "llama" / "with_lm_head" / "model_head.safetensors")["lm_head.weight"]
    assert manifest.same_as_base == {"lm_head": rounded_digest([head])}


@pytest.mark.parametrize("base", BASES)
def test_an_invertible_adapter_changes_what_goes_into_the_first_layer(tmp_path: Path, base: str) -> None:
    manifest, tensors = read(base, "seq_bn_inv", tmp_path)
    [op] = [op for op in manifest.modules if op.op == "coupling"]
    assert (op.site, op.layer, dict(op.options or {})) == ("stream", 0, {"activation": "relu"})
    uploaded = source(base, "seq_bn_inv")
    path = f"{LAYERS[base].partition('.')[0]}.invertible_adapters.task_1"
    for net in "FG":
        for slot, number in (("down", 0), ("down_bias", 0), ("up", 2), ("up_bias", 2)):
            part = "bias" if slot.endswith("bias") else "weight"
            expected = uploaded[f"{path}.{net}.{number}.{part}"]
            np.testing.assert_array_equal(tensors[op.tensors[f"{net}_{slot}"]], expected)


def changed_tensors(method: str, change: dict[str, Any], tmp_path: Path) -> Path:
    """A golden of the llama with other tensors; None takes one away."""
    folder = tmp_path / "changed"
    shutil.copytree(load_goldens("llama").folder(method), folder)
    found = load_file(folder / "adapter.safetensors")
    for name, values in change.items():
        found.pop(name, None)
        if values is not None:
            found[name] = values
    save_file(found, folder / "adapter.safetensors")
    return folder


INVERTIBLE = "model.invertible_adapters.task_1"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({f"{INVERTIBLE}.F.0.weight": np.ones((8, 15), np.float32)}, "expected [8, 16]: halves of 32"),
        ({f"{INVERTIBLE}.G.2.bias": None}, "but no G.2.bias"),
        ({f"{INVERTIBLE}.H.2.bias": np.ones(4, np.float32)}, "is not expected"),
        ({"x.invertible_adapters.task_1.F.0.bias": np.ones(8, np.float32)}, "2 invertible adapters"),
    ],
)
def test_an_invertible_adapter_that_its_file_contradicts_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    folder = changed_tensors("seq_bn_inv", change, tmp_path)
    with pytest.raises(MeshError) as caught:
        ingest_folder(folder, FACTS["llama"], tmp_path / "out")
    assert why in caught.value.message


def test_an_invertible_adapter_of_a_flexible_model_is_stored(tmp_path: Path) -> None:
    folder = changed_tensors("seq_bn_inv", {}, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_class": "LlamaAdapterModel"}))
    manifest = ingest_folder(folder, FACTS["llama"], tmp_path / "out")
    assert "whose causal head undoes it" in manifest.unservable_reason


def test_a_prompt_tuning_is_checked_and_stored(tmp_path: Path) -> None:
    config = json.loads((ROOT / "bert" / "base" / "config.json").read_text())
    facts = BaseFacts.from_config("golden", config, "sha256:" + "0" * 64)
    manifest = ingest_folder(ROOT / "bert" / "prompt_tuning", facts, tmp_path / "out")
    assert (manifest.kind, manifest.unservable_reason) == (
        "prompt_tuning",
        "not served yet: prompt tuning in a BertForMaskedLM",
    )
    folder = tmp_path / "changed"
    shutil.copytree(ROOT / "bert" / "prompt_tuning", folder)
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["config"]["prompt_length"] = 4
    file.write_text(json.dumps(saved))
    with pytest.raises(MeshError, match="prompt_length 4 from the config"):
        ingest_folder(folder, facts, tmp_path / "out")
    saved["config"]["prompt_length"] = 3
    file.write_text(json.dumps({**saved, "model_type": "llama"}))
    manifest = ingest_folder(folder, FACTS["llama"], tmp_path / "out")
    assert "no prompt tuning in a LlamaForCausalLM; train it with peft" in manifest.unservable_reason
