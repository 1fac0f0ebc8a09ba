import json
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import Code, MeshError, Progress, Publication, Reason, StoreClient
from adaptermesh.client.source_folder import read_folder
from adaptermesh.client.transfer import upload_messages
from adaptermesh.core.digests import digest_bytes
from tests.unit.client.fake_services import FakeStore

PUBLICATION = Publication("tiny", task="ner", tags=("x", "y"), license="apache-2.0", author="me")


async def test_an_upload_sends_every_file_in_order_with_its_digest(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    result = await store.upload(adapter_folder, "acme/ner", PUBLICATION)

    assert (result.version.ref, result.created, result.feed_position) == ("acme/ner:v1", True, 1)
    header = fake_store.headers[0]
    assert [file.path for file in header.files] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (header.task, list(header.tags), header.license, header.author) == (
        "ner",
        ["x", "y"],
        "apache-2.0",
        "me",
    )
    for file in header.files:
        stored = fake_store.files[result.version.digest, file.path]
        assert stored == (adapter_folder / file.path).read_bytes()
    assert len(fake_store.message_sizes) > 4


async def test_a_repeated_upload_is_the_same_version(store: StoreClient, adapter_folder: Path) -> None:
    first = await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    second = await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    assert second.version == first.version
    assert not second.created


async def test_an_upload_says_what_it_was_made_from(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    digest = digest_bytes(b"parent")
    recipe = {"method": "linear", "members": [{"digest": digest, "weight": 1.0}]}
    await store.upload(adapter_folder, "acme/a", PUBLICATION, parents=[digest], merge_recipe=recipe)
    await store.upload(adapter_folder, "acme/b", PUBLICATION)
    made, trained = fake_store.headers
    assert (list(made.parents), json.loads(made.merge_recipe_json)) == ([digest], recipe)
    assert (list(trained.parents), trained.merge_recipe_json) == ([], "")


async def test_validate_only_publishes_nothing(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    result = await store.upload(adapter_folder, "acme/ner", PUBLICATION, validate_only=True)
    assert not result.created
    assert fake_store.versions == {}


async def test_progress_grows_up_to_the_size_of_all_files(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    seen: list[Progress] = []
    await store.upload(adapter_folder, "acme/ner", PUBLICATION, progress=seen.append)
    total = sum(file.size_bytes for file in fake_store.headers[0].files)
    assert [progress.done_bytes for progress in seen] == sorted(progress.done_bytes for progress in seen)
    assert seen[-1] == Progress("adapter_model.safetensors", total, total)


async def test_a_refused_upload_gives_the_stores_reason(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    fake_store.refuse = MeshError(
        Code.INVALID_ARGUMENT, Reason.ADAPTER_REJECTED, "tensor q has NaN", metadata={"tensor": "q"}
    )
    with pytest.raises(MeshError, match="tensor q has NaN") as caught:
        await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    assert caught.value.reason is Reason.ADAPTER_REJECTED
    assert caught.value.metadata["tensor"] == "q"


async def test_pickled_weights_are_refused_before_anything_is_sent(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    (adapter_folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(MeshError, match="safe_serialization=True") as caught:
        await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    assert caught.value.reason is Reason.INVALID_UPLOAD
    assert fake_store.headers == []


async def test_what_a_training_run_leaves_beside_the_adapter_is_left_out(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    (adapter_folder / "training_args.bin").write_bytes(b"\x80\x02")
    (adapter_folder / ".gitattributes").write_text("*")
    (adapter_folder / "events.tfevents").write_bytes(b"x")
    (adapter_folder / "checkpoint-100").mkdir()
    (adapter_folder / "link.json").symlink_to(adapter_folder / "adapter_config.json")
    await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    paths = {file.path for file in fake_store.headers[0].files}
    assert paths == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("adapter_model.safetensors", "no .safetensors file"),
        ("adapter_config.json", "no adapter_config.json"),
    ],
)
async def test_a_folder_without_an_adapter_is_refused(
    store: StoreClient, adapter_folder: Path, missing: str, words: str
) -> None:
    (adapter_folder / missing).unlink()
    with pytest.raises(MeshError, match=words):
        await store.upload(adapter_folder, "acme/ner", PUBLICATION)


async def test_a_folder_that_is_not_there_is_refused(store: StoreClient, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="is not a folder"):
        await store.upload(tmp_path / "nowhere", "acme/ner", PUBLICATION)


async def test_an_illegal_name_is_refused(store: StoreClient, adapter_folder: Path) -> None:
    with pytest.raises(MeshError) as caught:
        await store.upload(adapter_folder, "Acme/NER", PUBLICATION)
    assert caught.value.reason is Reason.INVALID_NAME


async def test_an_empty_file_is_uploaded_too(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    (adapter_folder / "NOTICE.txt").write_bytes(b"")
    result = await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    assert fake_store.files[result.version.digest, "NOTICE.txt"] == b""
    assert fake_store.headers[0].files[0].digest == digest_bytes(b"")


async def test_a_refusal_that_grpc_lost_is_asked_for_again(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_store.refuse = MeshError(Code.NOT_FOUND, Reason.BASE_NOT_FOUND, "base 'tiny' does not exist")
    attempts: list[float] = []
    real = store._stub.UploadAdapter

    def lose_the_first(messages: Any, timeout: float) -> Any:
        attempts.append(timeout)
        if len(attempts) == 1:
            lost = grpc.aio.AioRpcError(
                grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core"
            )
            raise lost
        return real(messages, timeout=timeout)

    monkeypatch.setattr(store._stub, "UploadAdapter", lose_the_first)
    with pytest.raises(MeshError) as caught:
        await store.upload(adapter_folder, "acme/ner", PUBLICATION)
    assert caught.value.reason is Reason.BASE_NOT_FOUND
    assert len(attempts) == 2


async def test_a_stream_that_is_given_up_holds_no_file_open(adapter_folder: Path) -> None:
    files = await read_folder(adapter_folder)
    stream = upload_messages(store_pb2.UploadHeader(), files, None)
    for _ in range(3):
        await anext(stream)
    assert not [path for path in open_files() if path.is_relative_to(adapter_folder)]


def open_files() -> list[Path]:
    """Of this process."""
    return [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
