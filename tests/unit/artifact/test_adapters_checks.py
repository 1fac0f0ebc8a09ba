"""What is refused in a folder of the adapters library, and what its files may say in their own way."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from adaptermesh.artifact import plan
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.problems import Rejection
from adaptermesh.core.errors import Code, MeshError, Reason
from tests.parity.adapters.goldens import ROOT, files_in, ingest_folder, load_goldens

LLAMA, GPT2 = load_goldens("llama").facts, load_goldens("gpt2").facts
FFN = "model.layers.{}.output_adapters.adapters.task_1."
Q = "model.layers.{}.self_attn.q_proj.loras.task_1."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"

Change = dict[str, Any]


class Folder:
    """A copy of a golden, to be changed and ingested."""

    def __init__(self, root: Path, method: str, facts: BaseFacts) -> None:
        base = "gpt2" if facts is GPT2 else "llama"
        self.root = root
        self.facts = facts
        shutil.copytree(ROOT / base / method, root)

    def config(self, inner: Change | None = None, **top: Any) -> "Folder":
        """Sets keys of the method's config and of what stands around it; `...` takes one away."""
        raw = self.json(CONFIG)
        for place, changes in ((raw["config"], inner or {}), (raw, top)):
            place.update(changes)
            for key in [key for key, value in place.items() if value is ...]:
                del place[key]
        (self.root / CONFIG).write_text(json.dumps(raw))
        return self

    def json(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())

    def tensors(self, file: str = WEIGHTS, **changes: Any) -> "Folder":
        """Other tensors in a file: a shape for one of ones, an array for itself, None to take it away."""
        found: dict[str, Any] = load_file(self.root / file)
        for name, value in changes.items():
            if value is None:
                del found[name]
            else:
                found[name] = np.ones(value, np.float32) if isinstance(value, tuple) else value
        save_file(found, self.root / file)
        return self

    def rename(self, change: Callable[[str], str]) -> "Folder":
        found = load_file(self.root / WEIGHTS)
        save_file({change(name): value for name, value in found.items()}, self.root / WEIGHTS)
        return self

    def ingest(self) -> Manifest:
        return ingest_folder(self.root, self.facts, self.root.with_suffix(".canonical"))

    def rejection(self) -> str:
        with pytest.raises(Rejection) as caught:
            self.ingest()
        return caught.value.message

    def reason(self) -> str:
        manifest = self.ingest()
        assert not manifest.servable
        return manifest.unservable_reason


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Folder]:
    return lambda method, facts=LLAMA: Folder(tmp_path / "a", method, facts)


@pytest.mark.parametrize(
    ("top", "why"),
    [
        ({"name": "a.b"}, "name: String should match pattern"),
        ({"name": None}, "name: Input should be a valid string"),
        ({"name": ...}, "name: Field required"),
        ({"name": "task_2"}, "is of the adapter 'task_1', the config's name is 'task_2'"),
        ({"config": None}, "config: Input should be a valid dictionary"),
        ({"config": "seq_bn"}, "config: Input should be a valid dictionary"),
        ({"hidden_size": 64}, "hidden_size is 64, base model 'golden' (LlamaForCausalLM) has 32"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', base model 'golden' (LlamaForCausalLM) is a 'llama'"),
        ({"version": "adapters."}, "version is 'adapters.', expected such as 'adapters.1.3.0'"),
        ({"version": "3.2.1"}, "was not written by the 'adapters' library"),
        ({"version": ...}, "was not written by the 'adapters' library"),
        ({"turbo": 3}, "the key 'turbo' is unknown and set to '3'"),
    ],
)
def test_what_stands_around_the_method_is_checked(make: Any, top: Change, why: str) -> None:
    assert why in make("seq_bn").config(**top).rejection()


def test_keys_of_other_versions_and_of_no_effect_are_no_obstacle(make: Any) -> None:
    folder = make("seq_bn").config({"dropout": 0.5, "later": None}, type="text_task", later=False)
    assert folder.config(hidden_size=None, model_type=None).ingest().servable


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"reduction_factor": "16"}, "reduction_factor"),
        ({"reduction_factor": ...}, "reduction_factor: Field required"),
        ({"reduction_factor": {"0": 4}}, "reduction_factor says nothing of layer 1 and has no 'default'"),
        (
            {"reduction_factor": 8},
            "has shape [8, 32], expected [4, 32]: 32 from the base and the inner width 4",
        ),
        ({"mh_adapter": True}, "attention_adapters' is asked for by the config, but the file has no tensors"),
        ({"leave_out": [0]}, "layers.0.output_adapters' has tensors, but the config asks for nothing there"),
        ({"leave_out": [0, 1]}, "has tensors, but the config asks for nothing there"),
        ({"leave_out": None}, "leave_out: Input should be a valid list"),
        ({"residual_before_ln": None}, "residual_before_ln"),
        ({"original_ln_after": 1}, "original_ln_after: Input should be a valid boolean"),
        ({"non_linearity": None}, "non_linearity: Input should be a valid string"),
        ({"scaling": "learned"}, "but no scaling"),
        ({"scaling": "loud"}, "scaling"),
        ({"scaling": None}, "scaling"),
        ({"scaling": True}, "scaling"),
        ({"phm_layer": True}, "but no adapter_down.0.W_left"),
        (
            {"phm_layer": True, "phm_dim": 3},
            "phm_dim is 3, which does not divide both widths of layer 0, 32 and 8",
        ),
        ({"turbo": 3}, "config: the key 'turbo' is unknown"),
        ({"architecture": 4}, "architecture is '4'"),
        ({"architecture": "Brand New"}, "architecture"),
        ({"architecture": "union"}, "configs is no list of 1 to 16 configs"),
        ({"architecture": "union", "configs": [3]}, "configs holds something that is no config"),
        ({"architecture": "union", "configs": [{"architecture": []}]}, "architecture is"),
    ],
)
def test_a_bottlenecks_config_is_checked(make: Any, inner: Change, why: str) -> None:
    assert why in make("seq_bn").config(inner).rejection()


@pytest.mark.parametrize(
    ("tensor", "value", "why"),
    [
        ("adapter_up.weight", (32, 9), "has shape [32, 9], expected [32, 8]: 32 from the base"),
        ("adapter_up.bias", None, "and adapter_up.weight but no adapter_up.bias"),
        ("adapter_up.more", (2,), "adapter_up.more' is not expected"),
        ("adapter_up.bias", np.full(32, np.nan, np.float32), "has NaN or infinity at flat index 0"),
        ("adapter_up.bias", np.ones(32, np.float64), "is F64, expected one of F32, F16, BF16"),
        ("adapter_up.bias", np.ones(32, np.float16), "of different dtypes; save all in one"),
    ],
)
def test_a_bottlenecks_tensors_are_checked(make: Any, tensor: str, value: Any, why: str) -> None:
    assert why in make("seq_bn").tensors(**{FFN.format(1) + tensor: value}).rejection()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            FFN.format(2) + "adapter_up.weight",
            "is in layer 2, but base model 'golden' (LlamaForCausalLM) has layers",
        ),
        ("model.layers.0.mlp.adapters.task_1.x", "has tensors, but the config asks for nothing there"),
        ("model.layers.0.output_adapters.adapters.other.x.y", "is of the adapter 'other'"),
        ("model.norm.weight", "it is of no part of the adapter 'task_1'"),
        ("model.layers.0.mlp.up_proj.loras.task_1.lora_A", "the config asks for no such part"),
        ("model.shared_parameters.task_1.phm_rule", "what all modules share has "),
        ("layers.0.output_adapters.adapters.task_1.adapter_up.bias", "are the same one"),
    ],
)
def test_a_tensor_that_nothing_consumes_is_rejected(make: Any, name: str, why: str) -> None:
    assert why in make("seq_bn").tensors(**{name: (2, 2)}).rejection()


def test_a_headless_model_saves_the_same_adapter_without_its_prefix(make: Any, tmp_path: Path) -> None:
    plain = make("compacter").ingest()
    shutil.rmtree(tmp_path / "a")
    bare = make("compacter").rename(lambda name: name.removeprefix("model.")).ingest()
    assert bare.modules == plain.modules
    assert [chunk.sha256 for chunk in bare.chunks] == [chunk.sha256 for chunk in plain.chunks]


def test_an_adapter_named_as_a_part_of_the_path_is_read(make: Any) -> None:
    folder = make("seq_bn").config(name="adapters")
    assert folder.rename(lambda name: name.replace("task_1", "adapters")).ingest().servable


def test_a_half_precision_bottleneck_is_copied_as_it_is(make: Any) -> None:
    folder = make("seq_bn")
    found = {name: value.astype(np.float16) for name, value in load_file(folder.root / WEIGHTS).items()}
    manifest = folder.tensors(**found).ingest()
    assert {op.dtype for op in manifest.modules} == {"F16"}
    (folder.root / WEIGHTS).unlink()
    save_file(found, folder.root / WEIGHTS)
    folded = folder.config({"scaling": -1.5}).ingest()
    assert {(op.dtype, op.scale) for op in folded.modules} == {("F32", 1.0)}


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ({"cross_adapter": True}, "cross-attention"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln 'post_add'"),
        ({"use_gating": True, "ln_after": True}, "bottleneck; ln_before or ln_after"),
        ({"architecture": "brand_new"}, "the method brand_new"),
        ({"inv_adapter": "nice"}, "inv_adapter without an inv_adapter_reduction_factor"),
    ],
)
def test_a_configuration_that_would_be_computed_otherwise_is_stored(
    make: Any, inner: Change, why: str
) -> None:
    assert why in make("seq_bn").config(inner).reason()


def test_a_parallel_bottleneck_never_asks_how_the_residual_is_added(make: Any) -> None:
    folder = make("par_bn").config({"residual_before_ln": "post_add", "original_ln_before": True})
    assert folder.ingest().servable
    assert "not at all" in folder.config({"original_ln_after": False}).reason()


def test_what_would_take_too_much_room_is_stored_with_the_reason(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_EXPANDED_BYTES", 2000)
    assert "as the bottleneck that it is it would have" in make("compacter").reason()


@pytest.mark.parametrize("method", ["compacter", "vera", "adapter_plus"])
def test_products_that_leave_the_range_of_float32_are_rejected(make: Any, method: str) -> None:
    folder = make(method)
    found = load_file(folder.root / WEIGHTS)
    folder.tensors(**{name: np.full_like(value, 1e30) for name, value in found.items()})
    assert "the products of its tensors are too large for float32" in folder.rejection()


@pytest.mark.parametrize(
    ("method", "inner", "why"),
    [
        ("lora", {"r": 3}, "has shape [4, 32], expected [3, 32]: r 3 from the config, 32 in and 32 out"),
        ("lora", {"r": 0}, "r: Input should be greater than or equal to 1"),
        ("lora", {"alpha": 0}, "alpha: Input should be greater than 0"),
        ("lora", {"alpha": ...}, "alpha: Field required"),
        ("lora", {"attn_matrices": ["q", "x"]}, "attn_matrices.1"),
        ("lora", {"attn_matrices": ["q"]}, "v_proj' has tensors, but the config asks for nothing there"),
        ("lora", {"attn_matrices": ["q", "k", "v"]}, "k_proj' is asked for by the config"),
        ("lora", {"intermediate_lora": True}, "mlp.down_proj' is asked for by the config"),
        ("lora", {"composition_mode": "multiply"}, "composition_mode"),
        ("lora", {"composition_mode": "scale"}, "r is 4, composition_mode 'scale' needs 1"),
        ("lora", {"use_dora": True, "alpha": 4}, "has lora_A and lora_B but no m.weight"),
        ("lora", {"vera_d": 0.1}, "but no vera_D"),
        ("dora", {"use_dora": False}, "m.weight' is not expected"),
        ("vera", {"r": 5}, "has shape [4, 4], expected [5, 5]"),
        ("vera", {"attn_matrices": ["q", "v"]}, "v_proj' is asked for by the config"),
        ("ia3", {"use_dora": True}, "goes with neither DoRA nor VeRA"),
        ("ia3", {"r": 2}, "needs 1"),
    ],
)
def test_a_loras_config_is_checked_against_its_tensors(
    make: Any, method: str, inner: Change, why: str
) -> None:
    assert why in make(method).config(inner).rejection()


def test_vera_on_modules_of_other_widths_is_rejected(make: Any) -> None:
    folder = make("vera").config({"attn_matrices": ["q", "v"]})
    for layer in (0, 1):
        path = f"model.layers.{layer}.self_attn.v_proj.loras.task_1."
        folder.tensors(**{f"{path}vera_D": (4, 4), f"{path}vera_B": (16, 16)})
    assert "the matrices that a VeRA shares can't fit both" in folder.rejection()


def test_an_integer_is_no_value_for_vera_d_as_in_the_library(make: Any) -> None:
    assert make("lora").config({"vera_d": 1}).ingest().kind == "lora"


@pytest.mark.parametrize(
    ("method", "inner", "why"),
    [
        ("lora", {"use_gating": True}, "a learned gate in place of alpha/r"),
        ("ia3", {"alpha": 2}, "composition_mode 'scale' with an alpha of 2, only 1 is served"),
        ("vera", {"r": 257}, "a VeRA of rank 257, the highest that is served is 256"),
    ],
)
def test_a_lora_that_would_be_computed_otherwise_is_stored(
    make: Any, method: str, inner: Change, why: str
) -> None:
    assert why in make(method).config(inner).reason()


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ({"use_dora": True, "alpha": 4}, "wrong orientation"),
        ({"vera_d": 0.1}, "which the library can't run"),
    ],
)
def test_what_the_library_can_not_run_on_a_fused_base_is_stored(make: Any, inner: Change, why: str) -> None:
    assert why in make("lora", GPT2).config(inner).reason()


def other_base(**changes: Any) -> BaseFacts:
    return BaseFacts.from_config("golden", {**LLAMA.config, **changes}, LLAMA.weights_digest)


def test_dora_beside_a_bias_is_stored(make: Any) -> None:
    assert "multiplies by the magnitude too" in make("dora", other_base(attention_bias=True)).reason()


def test_an_architecture_that_the_library_reaches_by_a_plug_in_is_stored(make: Any) -> None:
    folder = make("seq_bn", other_base(architectures=["Qwen2ForCausalLM"], model_type="qwen2"))
    assert "through a plug-in" in folder.config(model_type="qwen2").reason()
    folder.facts = other_base(architectures=["MistralForCausalLM"], model_type="mistral")
    folder.config(model_type="mistral")
    assert folder.ingest().servable
    (folder.root / "adapter_interface.json").write_text("{}")
    assert "through a plug-in" in folder.reason()
    folder.facts = other_base(architectures=["MambaForCausalLM"], model_type="mistral")
    assert "MambaForCausalLM" in folder.reason()


@pytest.mark.parametrize(
    ("version", "scale"),
    [
        ("adapters.1.0.1", 1.0),
        ("adapters.0.2.2", 1.0),
        ("adapters.1.1.0.dev0", 1.0),
        ("adapters.1.1.0", 2.5),
        ("adapters.1.1", 2.5),
        ("adapters.2.0.0rc1", 2.5),
    ],
)
def test_alpha_had_no_effect_before_version_1_1(make: Any, version: str, scale: float) -> None:
    manifest = make("lora").config(version=version).ingest()
    assert {op.scale for op in manifest.modules} == {scale}
    assert dict(manifest.source.library_versions) == {"adapters": version.removeprefix("adapters.")}
    assert manifest.source.config["config"]["alpha"] == 10


def test_an_adapter_that_changes_no_module_is_rejected(make: Any) -> None:
    folder = make("lora").config({"leave_out": [0, 1]})
    assert "asks for nothing there" in folder.rejection()
    folder.config({"selfattn_lora": False, "leave_out": []})
    assert "asks for nothing there" in folder.rejection()


def test_zero_b_is_warned_of(make: Any) -> None:
    folder = make("lora")
    found = load_file(folder.root / WEIGHTS)
    folder.tensors(**{name: np.zeros_like(value) for name, value in found.items() if name.endswith("lora_B")})
    result = ingest(SourceBundle(files_in(folder.root), "acme", "x"), LLAMA, folder.root.with_suffix(".out"))
    assert "every lora_B is zero: the adapter changes nothing" in result.warnings


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config": {"head_type": "Odd One"}}, "head_type"),
        ({"hidden_size": 31}, "head_config.json: hidden_size is 31"),
        ({"name": "other"}, "is not expected: the head is named 'other'"),
        ({"turbo": 1}, "head_config.json: the key 'turbo' is unknown"),
        ({"model_class": None}, "model_class"),
        ({"config": {"head_type": "classification", "num_labels": 4}}, "has shape [3, 32], expected [4, 32]"),
        ({"config": {"head_type": "classification", "label2id": {"a": -1}}}, "label2id.a"),
    ],
)
def test_a_head_is_checked(make: Any, change: Change, why: str) -> None:
    folder = make("with_class_head")
    file = folder.root / "head_config.json"
    file.write_text(json.dumps({**folder.json("head_config.json"), **change}))
    assert why in folder.rejection()


def test_a_heads_values_are_looked_at(make: Any) -> None:
    bias = {"heads.task_1.4.bias": np.full(3, np.inf, np.float32)}
    assert (
        "heads.task_1.4.bias' has NaN"
        in make("with_class_head").tensors("model_head.safetensors", **bias).rejection()
    )


@pytest.mark.parametrize("missing", ["head_config.json", "model_head.safetensors"])
def test_half_a_head_is_rejected(make: Any, missing: str) -> None:
    folder = make("with_class_head")
    (folder.root / missing).unlink()
    assert f"is there without {missing}" in folder.rejection()


def test_an_lm_head_of_a_models_own_class_is_stored(make: Any) -> None:
    folder = make("with_class_head")
    head = folder.json("head_config.json")
    head["config"] |= {"head_type": "causal_lm", "num_labels": None, "label2id": None}
    (folder.root / "head_config.json").write_text(json.dumps(head))
    assert "an lm head of its own" in folder.reason()


def test_the_same_adapter_is_served_once_its_lm_head_is_left_out(make: Any) -> None:
    folder = make("with_lm_head")
    for name in ("head_config.json", "model_head.safetensors"):
        (folder.root / name).unlink()
    assert folder.ingest().servable


def test_a_tied_base_with_more_than_its_lm_head_is_stored(make: Any) -> None:
    folder = make("with_lm_head", GPT2).tensors("model_head.safetensors", extra=(2,))
    assert "an lm head of its own" in folder.reason()


@pytest.mark.parametrize(
    ("method", "file", "change", "why"),
    [
        ("fusion", "adapter_fusion_config.json", {"adapter_names": []}, "it names no adapters"),
        ("fusion", "adapter_fusion_config.json", {"adapter_names": [3]}, "it names no adapters"),
        ("fusion", "adapter_fusion_config.json", {"version": 3}, "version is '3'"),
        ("stack", "adapter_setup.json", {"adapter_setup": None}, "adapter_setup has no type"),
        ("stack", "a/adapter_config.json", {"version": "0.1"}, "a/adapter_config.json was not written by"),
    ],
)
def test_fusions_and_set_ups_are_checked(make: Any, method: str, file: str, change: Change, why: str) -> None:
    folder = make(method)
    (folder.root / file).write_text(json.dumps({**folder.json(file), **change}))
    assert why in folder.rejection()


def test_values_of_every_member_are_looked_at(make: Any) -> None:
    folder = make("stack")
    found = load_file(folder.root / "b" / WEIGHTS)
    next(iter(found.values()))[...] = np.nan
    save_file(found, folder.root / "b" / WEIGHTS)
    assert "has NaN" in folder.rejection()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "pytorch_adapter.bin",
            "save it again with use_safetensors=True, or upload the folder with adaptermesh's own",
        ),
        ("pytorch_model_head.bin", "use_safetensors=True"),
        ("other.bin", "may hold a pickle"),
        ("adapter_model.safetensors", "one adapter.safetensors must hold all tensors"),
        ("b/adapter.safetensors", "one adapter.safetensors must hold all tensors"),
    ],
)
def test_files_that_do_not_belong_are_rejected(make: Any, name: str, why: str) -> None:
    folder = make("seq_bn")
    (folder.root / name).parent.mkdir(exist_ok=True)
    (folder.root / name).write_bytes(b"x")
    assert why in folder.rejection()


def test_a_config_of_peft_beside_these_tensors_is_rejected(make: Any) -> None:
    folder = make("seq_bn")
    (folder.root / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    assert "was not written by the 'adapters' library" in folder.rejection()
    (folder.root / CONFIG).unlink()
    assert f"{CONFIG} is missing; upload the folder that save_adapter" in folder.rejection()


MANGLED = [
    "seq_bn",
    "compacter",
    "scaled_par_bn",
    "lora",
    "vera",
    "dora",
    "ia3",
    "with_class_head",
    "fusion",
    "fuse_static",
    "stack",
]
ODD = st.sampled_from(
    [
        None,
        0,
        -1,
        3,
        2**40,
        0.5,
        1e300,
        True,
        "",
        "x",
        "learned",
        [],
        ["q"],
        {},
        {"a": 2},
        {"default": 3},
        [[1]],
    ]
)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(MANGLED), st.data())
def test_mangled_files_and_configs_are_rejected_or_stored_and_never_crash(
    method: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name) / "a", method, LLAMA)
        for file in sorted(folder.root.rglob("*.json")):
            raw = json.loads(file.read_text())
            mangle(raw, data)
            file.write_text(json.dumps(raw))
        for file in sorted(folder.root.rglob("*.safetensors")):
            content = bytearray(file.read_bytes())
            for _ in range(data.draw(st.integers(0, 2))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            file.write_bytes(content)
        try:
            manifest = folder.ingest()
        except MeshError as error:
            assert error.code is Code.INVALID_ARGUMENT
            assert error.reason is Reason.ADAPTER_REJECTED
        else:
            # A fusion is kept whole, and is served with others only.
            assert manifest.servable == bool(manifest.modules) or manifest.op_kinds == ("fusion",)


def mangle(raw: dict[str, Any], data: st.DataObject) -> None:
    """Odd values in a config, and in the configs inside of it."""
    places = [raw, *(value for value in raw.values() if isinstance(value, dict) and value)]
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.sampled_from(places))
        place[data.draw(st.sampled_from(sorted(place)))] = copy.deepcopy(data.draw(ODD))
