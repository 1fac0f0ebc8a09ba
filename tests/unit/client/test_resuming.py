"""Uploads in parts against a real store, with failures put between."""

import asyncio
import stat
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import Code, MeshError, Progress, Publication, Reason, StoreClient
from adaptermesh.client.records import Lineage
from adaptermesh.client.resuming import Completed, ResumableUpload, ResumeConfig
from adaptermesh.client.source_folder import read_folder
from adaptermesh.client.transfer import STATUS_LOST, upload_header
from adaptermesh.client.upload_memory import UploadMemory
from adaptermesh.core.errors import unavailable
from adaptermesh.core.refs import AdapterName
from tests.unit.store.conftest import (
    BASE_NAME,
    RunningStore,
    base_model,
    make_files,
    running_store,
    store_config,
)

T = TypeVar("T")

PUBLICATION = Publication(BASE_NAME, license="mit")
WEIGHTS = "adapter_model.safetensors"
LOST = unavailable(Reason.STORE_UNREACHABLE, "the connection was lost", 1.0)


class ProcessEnded(Exception):
    """Stands for the end of the client's process."""


@dataclass
class Faulty:
    """The client's calls, of which some fail: `faults` says for each what comes in between."""

    client: StoreClient
    faults: Iterator[str]
    error: MeshError = LOST
    calls: list[str] = field(default_factory=list)

    async def begin_upload(self, header: store_pb2.UploadHeader) -> store_pb2.BeginUploadResponse:
        return await self._call("begin", self.client.begin_upload(header))

    async def send_part(self, messages: AsyncIterator[store_pb2.UploadPartRequest]) -> None:
        return await self._call("part", self.client.send_part(messages))

    async def get_upload(self, upload_id: str) -> store_pb2.GetUploadResponse:
        return await self._call("get", self.client.get_upload(upload_id))

    async def complete_upload(self, upload_id: str) -> store_pb2.CompleteUploadResponse:
        return await self._call("complete", self.client.complete_upload(upload_id))

    async def _call(self, name: str, work: Awaitable[T]) -> T:
        self.calls.append(name)
        fault = next(self.faults, "none")
        if fault == "before":
            asyncio.ensure_future(work).cancel()
            raise self.error
        answer = await work
        if fault == "after":
            raise self.error
        if fault == "process":
            raise ProcessEnded
        return answer


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[RunningStore]:
    async with running_store(store_config(tmp_path / "store")) as running:
        await running.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        yield running


@pytest.fixture
async def client(store: RunningStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.target) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    for path, data in make_files(rank=8).items():
        (made / path).write_bytes(data)
    return made


@dataclass
class Upload:
    """Everything that an upload is made of, in any process."""

    folder: Path
    memory: Path
    name: str = "acme/ner"
    pauses: list[float] = field(default_factory=list)
    seen: list[Progress] = field(default_factory=list)

    async def send(self, calls: Faulty, *, at_once: int = 1, attempts: int = 12) -> Completed:
        files = await read_folder(self.folder)
        header = upload_header(
            AdapterName.parse(self.name), PUBLICATION, files, Lineage(), validate_only=False
        )

        async def pause(seconds: float) -> None:
            self.pauses.append(seconds)

        config = ResumeConfig(part_bytes=1000, parts_at_once=at_once, attempts=attempts)
        memory = UploadMemory(self.memory, "the-store", self.name)
        upload = ResumableUpload(calls, header, files, memory, self.seen.append, config, pause=pause)
        return await upload.send()


async def assert_published(store: RunningStore, done: Completed, folder: Path) -> None:
    for file in done.response.version.source_files:
        request = store_pb2.DownloadFileRequest(digest=done.response.version.digest, path=file.path)
        data = b"".join([part.data async for part in store.stub.DownloadFile(request)])
        assert data == (folder / file.path).read_bytes()


FAULT = st.sampled_from(["none", "none", "none", "before", "after", "process"])
NAMES = count()


@given(faults=st.lists(FAULT, max_size=30), at_once=st.integers(1, 3))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_upload_is_published_once_whatever_is_lost_in_between(
    tmp_path: Path, folder: Path, faults: list[str], at_once: int
) -> None:
    async def run() -> None:
        async with _store(tmp_path / f"store-{next(NAMES)}") as (store, client):
            left = iter(faults)
            upload = Upload(folder, tmp_path / f"memory-{next(NAMES)}")
            done = None
            for _ in range(len(faults) + 2):
                try:
                    done = await upload.send(Faulty(client, left), at_once=at_once, attempts=40)
                    break
                except (ProcessEnded, BaseExceptionGroup, MeshError):
                    continue
            assert done is not None
            await assert_published(store, done, folder)
            assert len((await store.snapshot()).versions) == 1
            assert list(upload.memory.iterdir()) == []

    asyncio.run(run())


@asynccontextmanager
async def _store(folder: Path) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_store(store_config(folder)) as store, StoreClient(store.target) as client:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        yield store, client


async def test_only_what_is_missing_is_sent_after_an_interruption(
    store: RunningStore, client: StoreClient, folder: Path, tmp_path: Path
) -> None:
    upload = Upload(folder, tmp_path / "memory")
    calls = Faulty(client, iter(["none"] * 5 + ["before"]))
    done = await upload.send(calls)
    total = sum(-(-(folder / name).stat().st_size // 1000) for name in make_files())
    assert calls.calls.count("part") == total + 1
    assert calls.calls.count("begin") == 1
    assert done.resumed_bytes == 0
    assert len(upload.pauses) == 1
    seen = [progress.done_bytes for progress in upload.seen]
    assert seen == sorted(seen)
    assert seen[-1] == upload.seen[-1].total_bytes
    await assert_published(store, done, folder)


async def test_another_process_goes_on_where_the_first_one_stopped(
    store: RunningStore, client: StoreClient, folder: Path, tmp_path: Path
) -> None:
    upload = Upload(folder, tmp_path / "memory")
    with pytest.raises(BaseExceptionGroup):
        await upload.send(Faulty(client, iter(["none"] * 6 + ["process"])))
    (kept,) = upload.memory.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    calls = Faulty(client, iter([]))
    done = await upload.send(calls)
    assert "begin" not in calls.calls
    assert done.resumed_bytes > 3000
    assert list(upload.memory.iterdir()) == []
    await assert_published(store, done, folder)


async def test_a_store_that_does_not_come_back_is_given_up_and_the_upload_stays(
    client: StoreClient, store: RunningStore, folder: Path, tmp_path: Path
) -> None:
    upload = Upload(folder, tmp_path / "memory")
    with pytest.raises(MeshError, match="was lost"):
        await upload.send(Faulty(client, iter(["none"] * 4 + ["before"] * 100)), attempts=5)
    assert len(upload.pauses) == 4
    assert max(upload.pauses) <= 8.0
    assert (await upload.send(Faulty(client, iter([])))).resumed_bytes > 0


async def test_a_store_that_never_answered_is_not_waited_for(
    client: StoreClient, folder: Path, tmp_path: Path
) -> None:
    upload = Upload(folder, tmp_path / "memory")
    with pytest.raises(MeshError):
        await upload.send(Faulty(client, iter(["before"])))
    assert upload.pauses == []


async def test_an_upload_that_the_store_has_forgotten_begins_anew(
    store: RunningStore, client: StoreClient, folder: Path, tmp_path: Path
) -> None:
    upload = Upload(folder, tmp_path / "memory")
    with pytest.raises(BaseExceptionGroup):
        await upload.send(Faulty(client, iter(["none"] * 6 + ["process"])))
    upload_id = UploadMemory(upload.memory, "the-store", upload.name).recall()
    assert upload_id is not None
    await client.abandon_upload(upload_id)
    calls = Faulty(client, iter([]))
    done = await upload.send(calls)
    assert calls.calls[:2] == ["get", "begin"]
    await assert_published(store, done, folder)


async def test_a_refusal_ends_the_upload(
    client: StoreClient, store: RunningStore, folder: Path, tmp_path: Path
) -> None:
    (folder / WEIGHTS).write_bytes(b"no tensors at all")
    upload = Upload(folder, tmp_path / "memory")
    calls = Faulty(client, iter([]))
    with pytest.raises(MeshError) as caught:
        await upload.send(calls)
    assert caught.value.reason is Reason.ADAPTER_REJECTED
    assert calls.calls.count("complete") == 1
    assert list(upload.memory.iterdir()) == []


async def test_a_refusal_that_grpc_lost_is_asked_for_again(
    client: StoreClient, store: RunningStore, folder: Path, tmp_path: Path
) -> None:
    upload = Upload(folder, tmp_path / "memory")
    lost = MeshError(Code.INTERNAL, Reason.INTERNAL, STATUS_LOST)
    done = await upload.send(Faulty(client, iter(["none", "none", "before"]), lost))
    await assert_published(store, done, folder)


async def test_the_client_uploads_in_parts_when_it_is_asked_to(
    store: RunningStore, client: StoreClient, folder: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    done = await client.upload(folder, "acme/ner", PUBLICATION, in_parts=True, remember_in=memory)
    assert (done.created, done.resumed_bytes, done.version.number) == (True, 0, 1)
    assert list(memory.iterdir()) == []
    again = await client.upload(folder, "acme/ner", PUBLICATION, in_parts=True, remember_in=memory)
    assert (again.created, again.version) == (False, done.version)


async def test_a_store_that_knows_no_parts_gets_the_upload_in_one_piece(
    store: RunningStore, client: StoreClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(_: object) -> Any:
        raise MeshError(Code.UNIMPLEMENTED, Reason.INTERNAL, "Method not found!")

    monkeypatch.setattr(client, "begin_upload", unknown)
    done = await client.upload(folder, "acme/ner", PUBLICATION, in_parts=True, remember_in=tmp_path)
    assert done.created


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"store": "the-store", "header": "h"}', "\x00"])
def test_a_damaged_memory_is_no_memory(tmp_path: Path, content: str) -> None:
    memory = UploadMemory(tmp_path, "the-store", "h")
    memory.keep("key")
    assert memory.recall() == "key"
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert memory.recall() is None


def test_another_store_has_another_memory(tmp_path: Path) -> None:
    UploadMemory(tmp_path, "one", "h").keep("key")
    assert UploadMemory(tmp_path, "two", "h").recall() is None
    assert UploadMemory(tmp_path, "one", "g").recall() is None
    UploadMemory(tmp_path, "one", "h").forget()
    assert UploadMemory(tmp_path, "one", "h").recall() is None
