import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32, verify_file
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.safetensors_file import read_header
from adaptermesh.artifact.sites import site_map
from adaptermesh.core.errors import Code, MeshError, Reason

GOLDEN_DIGEST = "sha256:ec05a9e42e202049c0c45bb0cdbba9dbc359b7c920ea76d05ab6ad0150221214"

Q0 = "model.layers.0.self_attn.q_proj"


def deltas(manifest: Manifest, path: Path) -> dict[tuple[str, int], Any]:
    """s B A of every op, in float32."""
    entries = {entry.name: entry for entry in manifest.tensors}
    result = {}
    with open_buffer(path) as buffer:
        verify_file(manifest, buffer)
        for op in manifest.modules:
            a, b = (
                to_float32(entries[op.tensors[slot]], tensor_view(entries[op.tensors[slot]], buffer))
                for slot in ("A", "B")
            )
            result[op.site, op.layer] = op.scale * (b @ a)
    return result


def rejection(folder: Any) -> str:
    with pytest.raises(MeshError) as caught:
        folder.ingest()
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.ADAPTER_REJECTED)
    return caught.value.message


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_canonical_form_computes_what_the_source_does_in_each_dtype(folder: Any, dtype: str) -> None:
    manifest = folder.fill(dtype).ingest().manifest
    found = deltas(manifest, folder.out_file)
    assert set(found) == {(site, layer) for site in ("q", "v") for layer in range(3)}
    for (site, layer), delta in found.items():
        module = f"model.layers.{layer}.self_attn.{site}_proj"
        expected = 2.0 * (folder.source(module, "B") @ folder.source(module, "A"))
        np.testing.assert_array_equal(delta, expected)
    assert {entry.dtype for entry in manifest.tensors} == {dtype}
    assert {op.dtype for op in manifest.modules} == {dtype}


def test_the_manifest_describes_the_upload_and_reads_back_equal(folder: Any) -> None:
    folder.bundle |= {"task": "ner", "description": "Finds\nnames.", "tags": ("b", "a"), "author": "Ada"}
    result = folder.fill().ingest()
    manifest = result.manifest
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert result.warnings == ()
    assert (manifest.namespace, manifest.name, manifest.task, manifest.tags) == (
        "acme",
        "ner",
        "ner",
        ("a", "b"),
    )
    assert (manifest.kind, manifest.op_kinds, manifest.max_rank) == ("lora", ("lowrank",), 4)
    assert (manifest.servable, manifest.unservable_reason) == (True, "")
    assert manifest.base.digest == folder.base.digest
    assert manifest.source.config == folder.config
    assert dict(manifest.source.library_versions) == {"peft": "0.21.2"}
    assert [file.path for file in manifest.source.files] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert manifest.size_bytes == folder.out_file.stat().st_size
    assert manifest.cost.device_bytes == sum(entry.size for entry in manifest.tensors)


def test_the_same_files_give_the_same_digest_and_another_name_another_one(folder: Any) -> None:
    first = folder.fill().ingest().manifest.digest
    assert folder.ingest().manifest.digest == first
    folder.bundle["name"] = "other"
    assert folder.ingest().manifest.digest != first


def test_the_digest_of_a_fixed_adapter_never_changes(folder: Any) -> None:
    for layer in range(3):
        for module, out in (("q_proj", 16), ("v_proj", 8)):
            path = f"model.layers.{layer}.self_attn.{module}"
            folder.put(path, "A", np.arange(64, dtype=np.float32).reshape(4, 16) + layer)
            folder.put(path, "B", np.arange(out * 4, dtype=np.float32).reshape(out, 4) - layer)
    assert folder.ingest().manifest.digest == GOLDEN_DIGEST


def test_tensors_are_ordered_by_layer_aligned_and_chunked_by_layer(folder: Any) -> None:
    folder.config["r"] = 3
    manifest = folder.fill("F16").ingest().manifest
    assert [entry.name for entry in manifest.tensors] == [
        f"L{layer}.{site}.{slot}" for layer in range(3) for site in ("q", "v") for slot in ("A", "B")
    ]
    assert all(entry.offset % 64 == 0 for entry in manifest.tensors)
    assert [chunk.layer for chunk in manifest.chunks] == [-1, 0, 1, 2]
    header = read_header(folder.out_file)
    assert header.data_start == manifest.chunks[0].size
    for entry in manifest.tensors:
        assert header.tensors[entry.name] == entry


def test_the_canonical_file_opens_with_the_safetensors_library(folder: Any) -> None:
    from safetensors.numpy import load_file

    folder.config["r"] = 3
    manifest = folder.fill("F16").ingest().manifest
    loaded = load_file(folder.out_file)
    with open_buffer(folder.out_file) as buffer:
        for entry in manifest.tensors:
            np.testing.assert_array_equal(loaded[entry.name], tensor_view(entry, buffer))


def test_rslora_divides_alpha_by_the_root_of_the_rank(folder: Any) -> None:
    folder.config["use_rslora"] = True
    assert {op.scale for op in folder.fill().ingest().manifest.modules} == {8 / 4**0.5}


def test_rank_and_alpha_patterns_hold_per_module(folder: Any) -> None:
    folder.config["rank_pattern"] = {"layers.1.self_attn.q_proj": 2}
    folder.config["alpha_pattern"] = {r"layers\.(0|1)\..*v_proj": 32, "v_proj": 1}
    manifest = folder.fill().ingest().manifest
    found = {(op.site, op.layer): (op.rank, op.scale) for op in manifest.modules}
    assert found == {
        ("q", 0): (4, 2.0),
        ("q", 1): (2, 4.0),
        ("q", 2): (4, 2.0),
        ("v", 0): (4, 8.0),
        ("v", 1): (4, 8.0),
        ("v", 2): (4, 0.25),
    }
    assert manifest.max_rank == 4


def test_a_fused_projection_becomes_one_op_for_each_part(make_base: Any, make_folder: Any) -> None:
    folder = make_folder(make_base(architectures=["Phi3ForCausalLM"]))
    folder.config["target_modules"] = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
    manifest = folder.fill().ingest().manifest
    found = deltas(manifest, folder.out_file)
    for layer in range(3):
        for module, parts in (("self_attn.qkv_proj", "q k v"), ("mlp.gate_up_proj", "gate up")):
            path = f"model.layers.{layer}.{module}"
            whole = np.concatenate([found[site, layer] for site in parts.split()])
            np.testing.assert_array_equal(whole, 2.0 * (folder.source(path, "B") @ folder.source(path, "A")))


def test_gpt2_conv1d_modules_are_split_and_keep_their_orientation(make_base: Any, make_folder: Any) -> None:
    base = make_base(
        architectures=["GPT2LMHeadModel"],
        hidden_size=...,
        num_hidden_layers=...,
        n_embd=16,
        n_layer=3,
        n_head=4,
    )
    folder = make_folder(base)
    folder.config |= {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    manifest = folder.fill().ingest().manifest
    shapes = {op.site: deltas(manifest, folder.out_file)[op.site, 0].shape for op in manifest.modules}
    assert shapes == {
        "q": (16, 16),
        "k": (16, 16),
        "v": (16, 16),
        "o": (16, 16),
        "up": (64, 16),
        "down": (16, 64),
    }
    assert all(site.transposed for site in site_map(base).sites)


def test_fan_in_fan_out_on_a_base_without_conv1d_is_rejected(folder: Any) -> None:
    folder.config["fan_in_fan_out"] = True
    assert "no Conv1D" in rejection(folder.fill())


def test_layers_to_transform_limits_the_expected_modules(folder: Any) -> None:
    folder.config["layers_to_transform"] = [0, 2]
    folder.fill()
    for name in list(folder.tensors):
        if ".layers.1." in name:
            del folder.tensors[name]
    assert {op.layer for op in folder.ingest().manifest.modules} == {0, 2}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_value_that_is_not_finite_is_rejected_with_its_place(folder: Any, dtype: str, value: float) -> None:
    folder.fill(dtype)
    array = folder.tensors[f"base_model.model.{Q0}.lora_A.weight"][1]
    array[1, 3] = value
    assert f"{Q0}.lora_A.weight' has NaN or infinity at flat index 19" in rejection(folder)


def test_a_shape_that_disagrees_with_the_rank_is_rejected_with_both_shapes(folder: Any) -> None:
    folder.fill()
    folder.put(Q0, "A", np.ones((5, 16)))
    message = rejection(folder)
    assert "lora_A.weight' has shape [5, 16], expected [4, 16]" in message


def test_a_shape_that_disagrees_with_the_base_is_rejected(folder: Any) -> None:
    folder.fill()
    folder.put(Q0, "B", np.ones((17, 4)))
    assert "has shape [17, 4], expected [16, 4]: rank 4 from the config, 16 in and 16 out" in rejection(
        folder
    )


def test_a_layer_past_the_base_is_rejected(folder: Any) -> None:
    folder.fill().put("model.layers.3.self_attn.q_proj", "A", np.ones((4, 16)))
    assert "is in layer 3, but base model 'tiny' (LlamaForCausalLM) has layers 0 to 2" in rejection(folder)


def test_a_module_that_the_base_lacks_is_rejected(folder: Any) -> None:
    folder.fill().put("model.layers.0.self_attn.qkv_proj", "A", np.ones((4, 16)))
    assert "has no such module" in rejection(folder)


def test_a_without_b_is_rejected(folder: Any) -> None:
    folder.fill()
    del folder.tensors[f"base_model.model.{Q0}.lora_B.weight"]
    assert f"module '{Q0}' has lora_A but no lora_B" in rejection(folder)


def test_a_targeted_module_without_tensors_is_rejected(folder: Any) -> None:
    folder.fill()
    for slot in "AB":
        del folder.tensors[f"base_model.model.{Q0}.lora_{slot}.weight"]
    assert f"module '{Q0}' is targeted by the config, but the file has no tensors for it" in rejection(folder)


def test_tensors_of_a_module_that_is_not_targeted_are_rejected(folder: Any) -> None:
    folder.fill()
    folder.config["target_modules"] = ["v_proj"]
    assert f"module '{Q0}' has tensors, but the config does not target it" in rejection(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"base_model.model.{Q0}.lora_magnitude_vector", "DoRA"),
        (f"base_model.model.{Q0}.lora_B.bias", "lora_bias"),
        (f"base_model.model.{Q0}.lora_A.default.weight", "adapter's name"),
        ("base_model.model.model.norm.weight", "replace a tensor of the base"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "are named base_model.model."),
    ],
)
def test_a_tensor_that_nothing_consumes_is_rejected(folder: Any, name: str, why: str) -> None:
    folder.fill().tensors[name] = ("F32", np.ones((4, 16)))
    message = rejection(folder)
    assert "is not expected" in message
    assert why in message


def test_a_dtype_that_is_not_served_is_rejected(folder: Any) -> None:
    assert "is F64, expected one of F32, F16, BF16" in rejection(folder.fill("F64"))


def test_two_dtypes_in_one_module_are_rejected(folder: Any) -> None:
    folder.fill()
    folder.put(Q0, "B", np.ones((16, 4)), "F16")
    assert "different dtypes" in rejection(folder)


def test_an_adapter_that_changes_no_module_is_rejected(folder: Any) -> None:
    folder.config["target_modules"] = ["query"]
    assert "holds no tensors" in rejection(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 4.0),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("r", 10**400),
        ("lora_alpha", "8"),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": -1}),
        ("rank_pattern", ["q_proj"]),
        ("use_rslora", "yes"),
        ("target_modules", None),
        ("layers_to_transform", [-1]),
    ],
)
def test_a_config_value_out_of_its_range_is_rejected_with_its_key(folder: Any, key: str, value: Any) -> None:
    folder.fill().config[key] = value
    assert f"adapter_config.json: {key}" in rejection(folder)


def test_an_infinite_alpha_is_rejected(folder: Any) -> None:
    folder.fill().config["lora_alpha"] = float("inf")
    assert "not valid" in rejection(folder)


def test_a_pattern_that_is_not_cheap_to_match_is_rejected(folder: Any) -> None:
    folder.fill().config["rank_pattern"] = {"(?=.*)(a+)+q_proj": 4}
    message = rejection(folder)
    assert "rank_pattern: pattern '(?=.*)(a+)+q_proj'" in message
    assert "only plain regular syntax is supported" in message
    assert message.count("\n- ") == 1


def test_an_unknown_key_is_rejected_unless_it_is_switched_off(folder: Any) -> None:
    folder.fill().config |= {"enable_lora": None, "merge_weights": False}
    assert folder.ingest().manifest.servable
    folder.config["turbo"] = 3
    assert "the key 'turbo' is unknown and set to '3'" in rejection(folder)


@pytest.mark.parametrize(
    "value", [10**100, 1e22, -0.0, 1e-7, 0.1 + 0.2, "é\u2028", [[[["deep"]]]], {"": None}]
)
def test_any_value_without_effect_is_kept_as_it_stood(folder: Any, value: Any) -> None:
    folder.fill().config["auto_mapping"] = value
    manifest = folder.ingest().manifest
    assert manifest.source.config["auto_mapping"] == value
    assert Manifest.from_bytes(manifest.to_bytes()).digest == manifest.digest


def test_an_unknown_initialisation_is_rejected(folder: Any) -> None:
    folder.fill().config["init_lora_weights"] = "magic"
    assert "init_lora_weights" in rejection(folder)


def test_all_reasons_are_reported_together_and_bounded(folder: Any) -> None:
    folder.config["target_modules"] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    folder.fill()
    for name, (dtype, array) in list(folder.tensors.items()):
        folder.tensors[name] = (dtype, array[:, :-1])
    message = rejection(folder)
    assert message.count("\n- tensor") == 20
    assert message.endswith("and 22 more")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "changed base"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "BRAND_NEW"}, "BRAND_NEW"),
    ],
)
def test_a_kind_that_is_not_served_yet_is_stored_with_the_reason(folder: Any, changes: Any, why: str) -> None:
    folder.fill().config |= changes
    manifest = folder.ingest().manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason
    assert (manifest.modules, manifest.tensors, manifest.op_kinds) == ((), (), ())
    assert manifest.kind == changes.get("peft_type", "lora").lower()
    with open_buffer(folder.out_file) as buffer:
        verify_file(manifest, buffer)


@pytest.mark.parametrize(
    ("tokens", "kept"), [(None, None), ([], None), ([0], (0,)), ([63, 5, 63], (63, 5, 63)), ([7] * 256,) * 2]
)
def test_the_tokens_that_activate_an_adapter_are_kept(folder: Any, tokens: Any, kept: Any) -> None:
    folder.fill().config["alora_invocation_tokens"] = tokens
    manifest = folder.ingest().manifest
    assert manifest.servable
    if kept is None:
        assert manifest.activation is None
    else:
        assert manifest.activation.invocation_tokens == tuple(kept)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"alora_invocation_tokens": [1, 64]}, "has token 64, but base model 'tiny' (LlamaForCausalLM) has"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens.0: Input should be greater than"),
        ({"alora_invocation_tokens": [1.0]}, "alora_invocation_tokens.0: Input should be a valid integer"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens.0: Input should be a valid integer"),
        ({"alora_invocation_tokens": "<x>"}, "alora_invocation_tokens: Input should be a valid list"),
        ({"alora_invocation_tokens": [1] * 257}, "at most 256 items"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "a DoRA can't be activated"),
    ],
)
def test_tokens_that_can_not_activate_an_adapter_are_rejected(folder: Any, changes: Any, why: str) -> None:
    folder.fill().config |= changes
    assert why in rejection(folder)


@pytest.mark.parametrize("peft_type", ["XLORA", "LORA"])
def test_a_kind_that_is_not_served_still_passes_the_checks_of_its_files(folder: Any, peft_type: str) -> None:
    folder.fill().config |= {"peft_type": peft_type, "use_qalora": True}
    folder.tensors[f"base_model.model.{Q0}.lora_A.weight"][1][0, 0] = np.nan
    assert "NaN" in rejection(folder)


def test_an_adapter_of_an_architecture_without_a_module_map_is_stored(
    make_base: Any, make_folder: Any
) -> None:
    folder = make_folder(make_base())
    folder.fill().base = make_base(architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM" in folder.ingest().manifest.unservable_reason


def test_each_warning_is_given_and_stops_nothing(folder: Any) -> None:
    folder.fill().files = {"README.md": b"---\nbase_model: x\n---\n"}
    folder.bundle["license"] = ""
    for name, (_, array) in folder.tensors.items():
        if ".lora_B." in name:
            array[:] = -0.0
    assert folder.ingest().warnings == (
        "every lora_B is zero: the adapter changes nothing",
        "no licence is given",
        "the card (README.md) is absent or empty",
    )


def test_one_zero_b_is_counted(folder: Any) -> None:
    folder.fill().put(Q0, "B", np.zeros((16, 4)))
    assert folder.ingest().warnings == ("lora_B is zero in 1 of 6 modules: they change nothing",)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_rejected(folder: Any, missing: str) -> None:
    files = folder.fill().write()
    del files[missing]
    with pytest.raises(MeshError, match=f"{missing} is missing"):
        ingest(SourceBundle(files=files, **folder.bundle), folder.base, folder.out_file)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff{}", b'{"r": 1, "r": 2}', b"{}", b"[" * 100_000])
def test_a_config_that_is_no_config_is_rejected(folder: Any, data: bytes) -> None:
    files = folder.fill().write()
    files["adapter_config.json"].write_bytes(data)
    with pytest.raises(MeshError, match=r"adapter_config\.json"):
        ingest(SourceBundle(files=files, **folder.bundle), folder.base, folder.out_file)


def test_the_format_of_the_adapters_library_is_named_in_the_rejection(folder: Any) -> None:
    folder.fill().config = {"version": "adapters.1.3.0", "config": {}}
    assert "'adapters' library" in rejection(folder)


def test_a_truncated_file_and_a_bad_config_are_reported_together(folder: Any) -> None:
    files = folder.fill().write()
    weights = files["adapter_model.safetensors"]
    weights.write_bytes(weights.read_bytes()[:-1])
    files["adapter_config.json"].write_text(json.dumps({**folder.config, "r": 0}))
    with pytest.raises(MeshError) as caught:
        ingest(SourceBundle(files=files, **folder.bundle), folder.base, folder.out_file)
    assert "truncated" in caught.value.message
    assert "adapter_config.json: r:" in caught.value.message


def test_files_that_name_another_base_by_digest_are_refused_with_both_digests(folder: Any) -> None:
    other = "sha256:" + "0" * 64
    folder.fill().config["base_model_name_or_path"] = other
    with pytest.raises(MeshError) as caught:
        folder.ingest()
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert caught.value.metadata["adapter_base_digest"] == other
    assert caught.value.metadata["base_digest"] == folder.base.digest


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("namespace", "Acme", Reason.INVALID_NAME),
        ("name", "", Reason.INVALID_NAME),
        ("task", "x" * 257, Reason.INVALID_FIELD),
        ("license", "a\nb", Reason.INVALID_FIELD),
        ("description", "é" * 2049, Reason.INVALID_FIELD),
        ("tags", ("a", "a"), Reason.INVALID_FIELD),
        ("tags", ("",), Reason.INVALID_FIELD),
        ("tags", tuple(map(str, range(33))), Reason.INVALID_FIELD),
    ],
)
def test_a_publishers_field_out_of_its_range_is_refused(
    folder: Any, field: str, value: Any, reason: Reason
) -> None:
    folder.fill().bundle[field] = value
    with pytest.raises(MeshError) as caught:
        folder.ingest()
    assert caught.value.reason is reason


def test_ingest_needs_the_widths_of_the_base(make_base: Callable[..., BaseFacts], make_folder: Any) -> None:
    folder = make_folder(make_base())
    folder.fill().base = make_base(num_attention_heads=...)
    with pytest.raises(MeshError) as caught:
        folder.ingest()
    assert caught.value.metadata["field"] == "config.num_attention_heads"
