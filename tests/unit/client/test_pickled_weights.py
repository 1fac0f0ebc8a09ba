"""What the adapters library pickles is converted before it leaves the machine, and nothing else is opened."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaptermesh.client import MeshError, Publication, Reason, StoreClient
from adaptermesh.client.pickled_weights import convert
from adaptermesh.client.source_folder import read_folder
from tests.unit.client.fake_services import FakeStore

GOLDENS = Path(__file__).parents[2] / "parity" / "adapters" / "goldens" / "llama"


class Harmful:
    """A pickle of this would run a command; opening it must fail instead."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("opened",)


def pickled(source: str, target: Path) -> Path:
    """A folder of the library as it saves it by default."""
    shutil.copytree(GOLDENS / source, target)
    names = {"adapter.safetensors": "pytorch_adapter.bin", "model_head.safetensors": "pytorch_model_head.bin"}
    for path in list(target.rglob("*.safetensors")):
        torch.save(load_file(path), path.with_name(names[path.name]))
        path.unlink()
    return target


async def test_pickles_are_uploaded_as_the_safetensors_that_the_library_would_write(
    store: StoreClient, fake_store: FakeStore, tmp_path: Path
) -> None:
    folder = pickled("with_class_head", tmp_path / "a")
    first = await store.upload(folder, "acme/ner", Publication("tiny"))
    second = await store.upload(folder, "acme/ner", Publication("tiny"))
    assert second.version.digest == first.version.digest
    files = {
        path: data for (digest, path), data in fake_store.files.items() if digest == first.version.digest
    }
    assert sorted(files) == [
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]
    for name in ("adapter.safetensors", "model_head.safetensors"):
        (tmp_path / name).write_bytes(files[name])
        found, expected = load_file(tmp_path / name), load_file(GOLDENS / "with_class_head" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors") == []


async def test_tensors_that_share_their_memory_are_written_apart(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    torch.save({"a": tensor, "b": tensor, "c": tensor[::2]}, tmp_path / "pytorch_adapter.bin")
    convert(tmp_path / "pytorch_adapter.bin", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["c"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    "content",
    [Harmful(), {"a": 1}, [torch.ones(1)], b"", b"PK\x03\x04 no archive", b"\x80\x02.", b"\x80\x02a"],
)
def test_a_pickle_of_anything_but_tensors_is_refused(
    tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "pytorch_adapter.bin"
    if isinstance(content, bytes):
        place.write_bytes(content)
    else:
        torch.save(content, place)
    with pytest.raises(MeshError) as caught:
        convert(tmp_path / "pytorch_adapter.bin", tmp_path / "out.safetensors")
    assert caught.value.reason is Reason.INVALID_UPLOAD
    assert "pytorch_adapter.bin" in caught.value.message
    assert "opened" not in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()


def test_without_torch_the_words_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(MeshError, match=r"save_adapter\(\.\.\., use_safetensors=True\)"):
        convert(tmp_path / "pytorch_adapter.bin", tmp_path / "out.safetensors")


async def test_a_pickle_beside_its_safetensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(GOLDENS / "seq_bn", folder)
    torch.save({}, folder / "pytorch_adapter.bin")
    with pytest.raises(MeshError, match=r"holds both pytorch_adapter\.bin and adapter\.safetensors"):
        await read_folder(folder, tmp_path)


async def test_nowhere_to_convert_to_refuses_the_pickle(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="pickled weights"):
        await read_folder(pickled("seq_bn", tmp_path / "a"))


async def test_a_set_up_brings_the_folders_of_its_members(tmp_path: Path) -> None:
    folder = pickled("stack", tmp_path / "a")
    (folder / "a" / ".cache").mkdir()
    (folder / "link").symlink_to(folder / "a")
    (tmp_path / "room").mkdir()
    files = await read_folder(folder, tmp_path / "room")
    names = ("adapter.safetensors", "adapter_config.json", "head_config.json", "model_head.safetensors")
    assert [file.source.path for file in files] == [
        *(f"a/{name}" for name in names),
        "adapter_setup.json",
        *(f"b/{name}" for name in names),
    ]


async def test_a_fusion_needs_no_adapter_config(tmp_path: Path) -> None:
    files = await read_folder(GOLDENS / "fusion")
    assert [file.source.path for file in files] == [
        "adapter_fusion_config.json",
        "model_adapter_fusion.safetensors",
    ]
    assert json.loads(files[0].location.read_text())["name"] == "a,b"


async def test_a_set_up_brings_the_folder_of_its_fusion_too() -> None:
    files = await read_folder(GOLDENS / "fuse_static")
    assert [file.source.path for file in files] == [
        "a,b/adapter_fusion_config.json",
        "a,b/model_adapter_fusion.safetensors",
        *(f"a/{name}" for name in ("adapter.safetensors", "adapter_config.json")),
        "adapter_setup.json",
        *(f"b/{name}" for name in ("adapter.safetensors", "adapter_config.json")),
    ]
