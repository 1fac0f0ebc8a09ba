import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.models.weights import check_whole, weight_files, weights_digest


def test_the_digest_does_not_depend_on_how_the_weights_are_sharded(
    model_folder: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    assert len(weight_files(tmp_path / "sharded")) > 1
    assert weights_digest(tmp_path / "sharded") == weights_digest(model_folder)


def test_one_changed_value_changes_the_digest(model_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) != weights_digest(model_folder)


def test_another_name_or_shape_of_the_same_bytes_changes_the_digest(
    model_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    renamed = {("renamed" if key == name else key): value for key, value in tensors.items()}
    reshaped = {key: value.reshape(-1) if key == name else value for key, value in tensors.items()}
    digests = {weights_digest(model_folder)}
    for variant, changed in (("renamed", renamed), ("reshaped", reshaped)):
        (tmp_path / variant).mkdir()
        save_file(changed, tmp_path / variant / "model.safetensors")
        digests.add(weights_digest(tmp_path / variant))
    assert len(digests) == 3


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_found_without_reading_its_tensors(
    model_folder: Path, tmp_path: Path, kept: int
) -> None:
    data = (model_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:kept])
    with pytest.raises(MeshError) as caught:
        check_whole(tmp_path)
    assert caught.value.reason is Reason.DATA_CORRUPT


def test_a_missing_shard_is_found(model_folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path, max_shard_size="1KB")
    weight_files(tmp_path)[0].unlink()
    with pytest.raises(MeshError, match="missing"):
        check_whole(tmp_path)


def test_an_index_that_points_out_of_the_folder_is_refused(model_folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(model_folder / "model.safetensors", tmp_path / "outside.safetensors")
    (inside / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../outside.safetensors"}}')
    with pytest.raises(MeshError, match="missing"):
        weights_digest(inside)


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="missing"):
        weights_digest(tmp_path)
