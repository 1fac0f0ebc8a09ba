"""LoKr, OFT and BOFT as peft writes and computes them, against what ingest makes of them."""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config

from adaptermesh.artifact import peft_structured, plan
from adaptermesh.artifact.canonical import open_buffer, tensor_view
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.matrices import cayley, cayley_series, product, shrunk, tanh
from adaptermesh.artifact.peft_structured import factored, nearest_divisor
from adaptermesh.artifact.problems import Rejection
from adaptermesh.artifact.sites import site_map
from adaptermesh.core.digests import canonical_json
from adaptermesh.core.errors import MeshError, Reason
from tests.unit.artifact.boft_blocks import stand_in
from tests.unit.artifact.test_peft_written import SMALL, ingested, rewrite, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

Floats = npt.NDArray[Any]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True, scope="module")
def butterflies() -> Iterator[None]:
    with stand_in():
        yield


def dense(blocks: Floats, width: int) -> Floats:
    """x R as one matrix. blocks: [factors, count, n, n].

    Factor i sees the inputs in groups of 2^i blocks: of each group first the even halves of blocks.
    """
    total = np.eye(width)
    for factor in reversed(range(len(blocks))):
        repeated = [blocks[factor, place % blocks.shape[1]] for place in range(width // blocks.shape[2])]
        matrix = torch.block_diag(*map(torch.tensor, repeated)).double().numpy()
        if len(blocks) > 1:
            halves = np.arange(width).reshape(-1, 2 << factor, blocks.shape[2] // 2)
            order = np.concatenate((halves[:, ::2], halves[:, 1::2]), axis=1).flatten()
            mixed = np.eye(width)[order]
            matrix = mixed @ matrix @ mixed.T
        total = total @ matrix
    return total


def check_outputs(folder: Path, manifest: Manifest, facts: Any, tuned: Any) -> None:
    """Every module of peft gives for any input what the sites of it do together."""
    assert manifest.servable, manifest.unservable_reason
    assert manifest.op_kinds == ("structured",)
    entries = {entry.name: entry for entry in manifest.tensors}
    with open_buffer(folder.with_suffix(".canonical")) as buffer:
        held = {
            (op.site, op.layer): (
                op.scale,
                {slot: tensor_view(entries[name], buffer).astype(float) for slot, name in op.tensors.items()},
            )
            for op in manifest.modules
        }
    sites = site_map(facts)
    for path, module in tuned.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        place = sites.parts(path)
        assert place is not None
        tuner: Any = module
        base = tuner.get_base_layer()
        x = torch.randn(5, base.in_features)
        weight = base.weight.detach().double().numpy()
        bias = np.zeros(len(weight)) if base.bias is None else base.bias.detach().double().numpy()
        with torch.no_grad():
            expected = tuner(x).numpy()
        for site in place[0]:
            rows = slice(site.out_offset, site.out_offset + site.out_features)
            scale, tensors = held.pop((site.name, place[1]))
            found = apply(x.double().numpy(), weight[rows], bias[rows], scale, tensors, site.out_offset)
            np.testing.assert_allclose(found, expected[:, rows], rtol=1e-4, atol=1e-5)
    assert not held


def apply(
    x: Floats, weight: Floats, bias: Any, scale: float, tensors: Mapping[str, Floats], offset: int
) -> Floats:
    if "w1" in tensors:
        skipped = offset % len(tensors["w2"])
        delta = np.kron(tensors["w1"], tensors["w2"])[skipped : skipped + len(weight)]
        return np.asarray(x @ (weight + scale * delta).T + bias)
    turned = x @ dense(tensors["R"], x.shape[1])
    return np.asarray(tensors.get("row_scale", 1.0) * (turned @ weight.T) + bias)


LOKR: list[dict[str, Any]] = [
    {},
    {"r": 3, "alpha": 5, "decompose_factor": 2},
    {"r": 1, "alpha": 2, "decompose_both": True},
    {"r": 1, "decompose_both": True, "decompose_factor": 8},
    {"r": 2, "decompose_factor": 1},
    {"r": 2, "decompose_factor": 5},
    {
        "r": 2,
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"0.mlp.down_proj": 3},
        "init_weights": "lycoris",
    },
]
OFT: list[dict[str, Any]] = [
    {"oft_block_size": 4},
    {"oft_block_size": 32},
    {"oft_block_size": 5},
    {"r": 3, "oft_block_size": 0},
    {"oft_block_size": 8, "block_share": True},
    {"oft_block_size": 4, "coft": True, "eps": 0.7},
    {"oft_block_size": 8, "block_share": True, "coft": True, "eps": 0.3},
    {"oft_block_size": 8, "use_cayley_neumann": False, "module_dropout": 0.1},
    *({"oft_block_size": 4, "num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 6, 9)),
]
BOFT: list[dict[str, Any]] = [
    {},
    {"boft_block_size": 8, "boft_dropout": 0.1},
    {"boft_block_size": 0, "boft_block_num": 4},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
    {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3},
]
CONFIGS: list[tuple[Any, dict[str, Any]]] = [
    *((peft.LoKrConfig, changes) for changes in LOKR),
    *((peft.OFTConfig, changes) for changes in OFT),
    *((peft.BOFTConfig, changes) for changes in BOFT),
]
BASES: dict[str, tuple[Any, list[str]]] = {
    "llama": (LlamaConfig(**SMALL), EVERY),
    "phi3": (Phi3Config(**SMALL), FUSED),
    # It has biases.
    "qwen2": (Qwen2Config(**SMALL), ["q_proj", "v_proj", "down_proj"]),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("method", "changes"), CONFIGS, ids=lambda value: str(getattr(value, "__name__", ""))
)
def test_an_adapter_written_by_peft_keeps_its_arithmetic(
    tmp_path: Path, base: str, method: Any, changes: dict[str, Any]
) -> None:
    config, names = BASES[base]
    facts, tuned = write(config, method(target_modules=names, **changes), tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert manifest.kind == method.__name__.removesuffix("Config").lower()
    check_outputs(tmp_path / "a", manifest, facts, tuned.eval())


def test_a_fused_modules_sites_need_not_begin_where_a_row_of_w1_does(tmp_path: Path) -> None:
    # q has 16 rows and k and v have 8; with w2 of 8 times 3 rows k begins within one.
    config = Phi3Config(**{**SMALL, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3})
    method = peft.LoKrConfig(r=9, decompose_factor=3, target_modules=FUSED)
    facts, tuned = write(config, method, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    shapes = {entry.name: entry.shape for entry in manifest.tensors}
    assert [shapes[f"L0.{site}.w1"][0] for site in "qkv"] == [2, 2, 1]
    check_outputs(tmp_path / "a", manifest, facts, tuned.eval())


def test_a_boft_written_without_the_extension_has_one_factor_whatever_its_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", False)
    method = peft.BOFTConfig(boft_n_butterfly_factor=3, target_modules=EVERY)
    facts, tuned = write(LlamaConfig(**SMALL), method, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert {len(manifest.tensors[0].shape), manifest.tensors[0].shape[0]} == {4, 1}
    check_outputs(tmp_path / "a", manifest, facts, tuned.eval())


@pytest.mark.parametrize("method", [peft.LoKrConfig, peft.OFTConfig, peft.BOFTConfig])
def test_peft_has_none_of_them_for_conv1d_so_that_a_claim_to_one_is_stored(
    tmp_path: Path, method: Any
) -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64)
    with pytest.raises(TypeError, match="supported"):
        peft.get_peft_model(AutoModelForCausalLM.from_config(config), method(target_modules=["c_attn"]))
    write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    facts, _ = write(config, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), tmp_path / "b")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert "for the Conv1D modules of this base" in manifest.unservable_reason


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (
            peft.OFTConfig,
            {"peft_version": "0.17.1"},
            "peft 0.17.1 computed use_cayley_neumann in another way",
        ),
        (peft.OFTConfig, {"peft_version": None}, "peft of unknown version"),
        (peft.BOFTConfig, {"target_modules": ["q_proj", "lm_head"]}, "a BOFT of lm_head"),
        (peft.LoKrConfig, {"target_modules": ["q_proj", "embed_tokens"]}, "a LoKr of model.embed_tokens"),
        (peft.LoKrConfig, {"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    ],
)
def test_a_variant_is_stored_with_the_reason(
    tmp_path: Path, method: Any, changes: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    reconfigure(tmp_path / "a", changes)
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason


def test_an_exact_oft_of_an_older_peft_is_served(tmp_path: Path) -> None:
    method = peft.OFTConfig(target_modules=["q_proj"], use_cayley_neumann=False, oft_block_size=4)
    facts, tuned = write(LlamaConfig(**SMALL), method, tmp_path / "a")
    reconfigure(tmp_path / "a", {"peft_version": "0.17.1"})
    check_outputs(tmp_path / "a", ingested(tmp_path / "a", facts).manifest, facts, tuned.eval())


@pytest.mark.parametrize(
    ("method", "bounds", "why"),
    [
        (peft.OFTConfig(target_modules=EVERY), {"MAX_BLOCK": 23}, "mixes 24 inputs; the most that is served"),
        (peft.BOFTConfig(target_modules=EVERY, boft_block_size=8), {"MAX_BLOCK": 7}, "mixes 8 inputs"),
        (
            peft.LoKrConfig(target_modules=EVERY, r=1, decompose_factor=1),
            {"MAX_EXPANDED_BYTES": 9_000},
            "as the LoKr that it is it would have",
        ),
    ],
)
def test_what_would_become_too_much_is_stored_with_the_reason(
    tmp_path: Path, method: peft.PeftConfig, bounds: dict[str, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(peft_structured if name == "MAX_BLOCK" else plan, name, value)
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(method), tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (peft.OFTConfig, {"r": 4}, "one of r and oft_block_size has to be 0, found 4 and 32"),
        (peft.OFTConfig, {"oft_block_size": 0}, "found 0 and 0"),
        (peft.OFTConfig, {"oft_block_size": 4}, "expected [4, 6]: r 0, oft_block_size 4 from the config"),
        (peft.OFTConfig, {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms"),
        (peft.OFTConfig, {"eps": -1.0}, "eps"),
        (peft.OFTConfig, {"use_turns": 3}, "the key 'use_turns' is unknown"),
        (peft.BOFTConfig, {"boft_block_size": 5}, "has 16 inputs, which is no multiple of 5"),
        (peft.BOFTConfig, {"boft_block_num": 2}, "one of boft_block_size and boft_block_num has to be 0"),
        (peft.BOFTConfig, {"boft_block_size": 8}, "expected [1, 2, 8, 8]: boft_block_size 8"),
        (peft.BOFTConfig, {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor"),
        (peft.BOFTConfig, {"turns": True}, "the key 'turns' is unknown"),
        (peft.LoKrConfig, {"decompose_factor": 2}, "rank 8, decompose_factor 2 from the config"),
        (peft.LoKrConfig, {"r": 0}, "adapter_config.json: r"),
        (peft.LoKrConfig, {"alpha": -2}, "adapter_config.json: alpha"),
        (peft.LoKrConfig, {"r": 1}, "lokr_w2' is not expected: the module has lokr_w1 and lokr_w2_a and"),
        (peft.LoKrConfig, {"unbalanced": 1}, "the key 'unbalanced' is unknown"),
        (peft.LoKrConfig, {"fan_in_fan_out": True}, "the base has no Conv1D modules"),
    ],
)
def test_a_config_that_its_file_does_not_bear_out_is_rejected(
    tmp_path: Path, method: Any, changes: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    reconfigure(tmp_path / "a", changes)
    with pytest.raises(Rejection) as caught:
        ingested(tmp_path / "a", facts)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("method", "tensors", "why"),
    [
        (peft.LoKrConfig, {"lokr_w1": None}, "has lokr_w2 but no lokr_w1"),
        (peft.LoKrConfig, {"lokr_w1": (4, 3)}, "has shape [4, 3], expected [4, 4]"),
        (peft.LoKrConfig, {"lokr_w1_a": (4, 8)}, "lokr_w1_a' is not expected: the module has lokr_w1 and"),
        (peft.LoKrConfig, {"lokr_t2": (2, 2)}, "lokr_t2' is not expected"),
        (peft.OFTConfig, {"oft_R.weight": None}, "the file has no tensors"),
        (peft.OFTConfig, {"oft_R.weight": (1, 119)}, "has shape [1, 119], expected [1, 120]"),
        (peft.OFTConfig, {"oft_r": (4, 4, 4)}, "tensors of a peft OFT are named"),
        (peft.BOFTConfig, {"boft_s": None}, "has boft_R but no boft_s"),
        (peft.BOFTConfig, {"boft_s": (16,)}, "has shape [16], expected [16, 1]"),
        (peft.BOFTConfig, {"boft_R": (2, 4, 4, 4)}, "has shape [2, 4, 4, 4], expected [1, 4, 4, 4]"),
        (peft.BOFTConfig, {"boft_P": (4, 4)}, "boft_P' is not expected"),
    ],
)
def test_a_file_that_its_config_does_not_bear_out_is_rejected(
    tmp_path: Path, method: Any, tensors: dict[str, tuple[int, ...] | None], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    rewrite(
        tmp_path / "a",
        {
            f"{Q0}.{name}": None if shape is None else np.ones(shape, np.float32)
            for name, shape in tensors.items()
        },
    )
    with pytest.raises(Rejection) as caught:
        ingested(tmp_path / "a", facts)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (peft.LoKrConfig(r=1, target_modules=["q_proj"]), "lokr_w2_a"),
        (peft.OFTConfig(target_modules=["q_proj"]), "oft_R.weight"),
        (peft.BOFTConfig(target_modules=["q_proj"]), "boft_R"),
    ],
)
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_numbers_that_can_not_be_computed_with_are_rejected(
    tmp_path: Path, method: peft.PeftConfig, name: str, value: float
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(method), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    large = tensors[f"{Q0}.{name}"].copy()
    large.flat[1:7] = value
    others = {} if name != "lokr_w2_a" else {f"{Q0}.lokr_w2_b": np.full((1, 4), 30.0, np.float32)}
    rewrite(tmp_path / "a", {f"{Q0}.{name}": large, **others})
    if name == "boft_R" and value == 3e38:
        # A rotation however far it turns: all that is asked is that its numbers are numbers.
        assert ingested(tmp_path / "a", facts).manifest.servable
        return
    with pytest.raises(Rejection, match="finite"):
        ingested(tmp_path / "a", facts)


@pytest.mark.parametrize(("method", "name"), [(peft.LoKrConfig, "lokr_w1"), (peft.OFTConfig, "oft_R")])
def test_an_adapter_that_changes_nothing_is_warned_of(tmp_path: Path, method: Any, name: str) -> None:
    facts, _ = write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    zeros = {key: np.zeros_like(value) for key, value in load_file(file).items() if name in key}
    rewrite(tmp_path / "a", dict(zeros))
    assert f"every {name} is zero: the adapter changes nothing" in ingested(tmp_path / "a", facts).warnings


def reconfigure(folder: Path, changes: Mapping[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("factor", [-7, -1, 0, 1, 2, 3, 4, 5, 7, 16, 40, 41, 10**6])
def test_widths_are_split_as_peft_splits_them(factor: int) -> None:
    for width in range(1, 400):
        assert factored(width, factor) == factorization(width, factor)


def test_blocks_have_the_width_that_peft_gives_them() -> None:
    for width, wanted in itertools.product((1, 2, 16, 24, 97, 576, 1536), range(1, 600)):
        expected = OFTLayer.adjust_oft_parameters(cast("Any", None), width, wanted)
        assert nearest_divisor(width, wanted) == (wanted if width % wanted == 0 else expected)


def test_products_and_rotations_are_those_of_numpy() -> None:
    random = np.random.default_rng(3)
    for count, size in ((1, 1), (3, 2), (2, 7), (1, 32)):
        a, b = random.standard_normal((2, count, size, size))
        skew, unit = a - a.transpose(0, 2, 1), np.eye(size)
        np.testing.assert_allclose(product(a, b), a @ b, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            cayley(skew), (unit - skew) @ np.linalg.inv(unit + skew), rtol=1e-9, atol=1e-9
        )
        small = 0.1 / size * skew
        np.testing.assert_allclose(cayley_series(small, 16), cayley(-small), rtol=1e-6, atol=1e-6)
        for most in (1e9, 0.5):
            norms = np.linalg.norm(shrunk(skew, most).reshape(count, -1), axis=1)
            before = np.linalg.norm(skew.reshape(count, -1), axis=1)
            np.testing.assert_allclose(norms, np.minimum(before, most), rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        (peft.LoKrConfig, {"rank": 1}, "has rank 1"),
        (peft.LoKrConfig, {"tensors": {"w1": "L0.q.w1", "R": "L0.q.w2"}}, "has slots"),
        (peft.LoKrConfig, {"tensors": {"w1": "L0.q.w1"}}, "has slots"),
        (peft.LoKrConfig, {"tensors": {}}, "has slots"),
        (peft.LoKrConfig, {"tensors": {"R": "L0.q.w1"}, "scale": 1.0}, "has R of shape"),
        (peft.LoKrConfig, {"options": {"order": "x"}}, "has options"),
        (peft.BOFTConfig, {"scale": 2.0}, "has scale 2.0 for nothing"),
        (peft.BOFTConfig, {"tensors": {"w1": "L0.q.R", "w2": "L0.q.row_scale"}}, "has w1 of shape"),
        (peft.BOFTConfig, {"tensors": {"R": "L0.q.row_scale", "row_scale": "L0.q.R"}}, "has R of shape"),
    ],
)
def test_a_manifest_with_another_structure_is_corrupt(
    tmp_path: Path, method: Any, change: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    value = json.loads(ingested(tmp_path / "a", facts).manifest.to_bytes())
    value["modules"][0] |= change
    with pytest.raises(MeshError, match=why) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert caught.value.reason is Reason.DATA_CORRUPT


def test_a_rotation_has_no_more_factors_than_its_blocks_allow(tmp_path: Path) -> None:
    method = peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4)
    facts, _ = write(LlamaConfig(**{**SMALL, "hidden_size": 64}), method, tmp_path / "a")
    value = json.loads(ingested(tmp_path / "a", facts).manifest.to_bytes())
    assert value["tensors"][0]["shape"] == [1, 16, 4, 4]
    for changed, fits in (([2, 8, 4, 4], True), ([4, 4, 4, 4], False), ([256, 1, 1, 1], False)):
        value["tensors"][0]["shape"] = changed
        if fits:
            Manifest.from_bytes(canonical_json(value))
            continue
        with pytest.raises(MeshError, match="factors of"):
            Manifest.from_bytes(canonical_json(value))


def test_the_tanh_of_plain_operations_is_that_of_the_library() -> None:
    x = np.concatenate(([0.0, -0.0, 1e-9, -1e-300, 700.0, -1e9], np.linspace(-30.0, 30.0, 6001)))
    found = tanh(x)
    np.testing.assert_allclose(found, np.tanh(x), rtol=1e-7, atol=1e-15)
    np.testing.assert_allclose(found[np.abs(x) > 1e-2], np.tanh(x)[np.abs(x) > 1e-2], rtol=1e-13)
    assert np.abs(found).max() <= 1.0
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
