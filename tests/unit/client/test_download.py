from pathlib import Path

import pytest

from adaptermesh.client import Code, MeshError, Progress, Publication, Reason, StoreClient
from adaptermesh.client.transfer import destination
from tests.unit.client.fake_services import FakeStore

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
async def published(store: StoreClient, adapter_folder: Path) -> Path:
    (adapter_folder / "empty.txt").write_bytes(b"")
    await store.upload(adapter_folder, "acme/ner", Publication("tiny"))
    return adapter_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_a_download_gives_back_what_was_uploaded(
    store: StoreClient, published: Path, tmp_path: Path
) -> None:
    version = await store.download("acme/ner:v1", tmp_path / "out")
    assert version.ref == "acme/ner:v1"
    assert contents(tmp_path / "out") == contents(published)


async def test_a_broken_download_is_continued_where_it_stopped(
    store: StoreClient, fake_store: FakeStore, published: Path, tmp_path: Path
) -> None:
    fake_store.break_after = 500_000
    with pytest.raises(MeshError, match="going away"):
        await store.download("acme/ner:v1", tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    fake_store.offsets.clear()

    await store.download("acme/ner:v1", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(published)
    assert max(fake_store.offsets) >= 500_000


async def test_a_damaged_partial_file_is_fetched_anew(
    store: StoreClient, fake_store: FakeStore, published: Path, tmp_path: Path
) -> None:
    fake_store.break_after = 500_000
    with pytest.raises(MeshError):
        await store.download("acme/ner:v1", tmp_path / "out")
    (part,) = (tmp_path / "out").glob("*.part")
    part.write_bytes(bytes(part.stat().st_size))

    await store.download("acme/ner:v1", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(published)


async def test_a_partial_file_that_is_too_long_is_fetched_anew(
    store: StoreClient, fake_store: FakeStore, published: Path, tmp_path: Path
) -> None:
    fake_store.break_after = 500_000
    with pytest.raises(MeshError):
        await store.download("acme/ner:v1", tmp_path / "out")
    (part,) = (tmp_path / "out").glob("*.part")
    part.write_bytes(bytes(10_000_000))

    await store.download("acme/ner:v1", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(published)


async def test_wrong_bytes_are_never_kept(
    store: StoreClient, fake_store: FakeStore, published: Path, tmp_path: Path
) -> None:
    fake_store.corrupt = 1
    with pytest.raises(MeshError) as caught:
        await store.download("acme/ner:v1", tmp_path / "out")
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
    assert list((tmp_path / "out").iterdir()) == []


async def test_a_file_that_differs_is_overwritten_only_with_force(
    store: StoreClient, published: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / WEIGHTS).write_bytes(b"mine")
    with pytest.raises(MeshError, match="exists and differs") as caught:
        await store.download("acme/ner:v1", out)
    assert caught.value.code is Code.ALREADY_EXISTS
    assert (out / WEIGHTS).read_bytes() == b"mine"

    await store.download("acme/ner:v1", out, force=True)
    assert contents(out) == contents(published)


async def test_a_folder_in_the_way_is_not_overwritten_with_force(
    store: StoreClient, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(MeshError, match="exists and differs"):
        await store.download("acme/ner:v1", tmp_path / "out", force=True)


async def test_files_that_are_there_already_are_not_fetched_again(
    store: StoreClient, fake_store: FakeStore, published: Path
) -> None:
    seen: list[Progress] = []
    await store.download("acme/ner:v1", published, progress=seen.append)
    assert fake_store.offsets == []
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0


@pytest.mark.parametrize("path", ["../escape", "/etc/passwd", "a/../../b", "", "a\\b", ".."])
def test_a_stored_path_never_leaves_the_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="not safe to write"):
        destination(tmp_path, path)


def test_a_stored_path_may_name_a_folder(tmp_path: Path) -> None:
    assert destination(tmp_path, "a/b.json") == tmp_path / "a" / "b.json"
