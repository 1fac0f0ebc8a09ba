"""An adapter of the Hugging Face hub, over a server on loopback that speaks enough of its API."""

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import Code, MeshError, Publication, Reason, StoreClient
from adaptermesh.client import hub_repository as hub_module
from adaptermesh.client.hub_repository import HubRepository
from adaptermesh.client.moving import import_from_hub
from tests.unit.store.conftest import BASE_NAME, base_model, make_files, running_store, store_config

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """One repository, `org/ner`, with one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.sizes: dict[str, int | None] = {}
        self.fetched: list[str] = []
        self.revisions = {"main", "v1", COMMIT}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def described(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": self.sizes.get(name, len(data))} for name, data in self.files.items()
        ]
        return {"id": "org/ner", "modelId": "org/ner", "sha": COMMIT, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        api = "/api/models/org/ner"
        if path == api or path in {f"{api}/revision/{revision}" for revision in hub.revisions}:
            self._send(200, json.dumps(hub.described()).encode(), with_body, "application/json")
        elif path.startswith(f"{api}/revision/"):
            self._send(404, b"", with_body, "text/plain", **{"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/org/ner/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/ner/resolve/{COMMIT}/")
            if with_body:
                hub.fetched.append(name)
            data = hub.files[name]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._send(200, data, with_body, "text/plain", **{"ETag": etag, "X-Repo-Commit": COMMIT})
        else:
            self._send(401, b"", with_body, "text/plain", **{"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, data: bytes, with_body: bool, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    server = Hub()
    server.files = {
        **make_files(),
        ".gitattributes": b"x",
        "optimizer.pt": b"\x80pickle",
        "tokenizer.json": b"{}",
        "checkpoint-1/adapter_model.safetensors": b"old",
        "train.py": b"print()",
    }
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[StoreClient]:
    async with running_store(store_config(tmp_path / "store")) as store, StoreClient(store.target) as client:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        yield client


PUBLICATION = Publication(BASE_NAME, license="mit")


async def refused(hub: Hub, folder: Path, text: str = "hf://org/ner") -> MeshError:
    with pytest.raises(MeshError) as caught:
        await HubRepository.parse(text, hub.endpoint).fetch(folder)
    return caught.value


async def test_only_the_adapters_own_files_are_fetched_and_published(hub: Hub, client: StoreClient) -> None:
    done = await import_from_hub(client, "hf://org/ner@v1", "acme/ner", PUBLICATION, endpoint=hub.endpoint)
    assert done.version.ref == "acme/ner:v1"
    assert sorted(hub.fetched) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert {file.path for file in done.version.source_files} == set(hub.fetched)


async def test_a_repository_is_read_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    for revision in ("", "@main", f"@{COMMIT}"):
        folder = tmp_path / f"at{revision}"
        await asyncio.to_thread(folder.mkdir)
        assert await HubRepository.parse(f"hf://org/ner{revision}", hub.endpoint).fetch(folder) == COMMIT


@pytest.mark.parametrize("text", ["hf://org/nobody", "hf://org/ner@gone"])
async def test_what_the_hub_does_not_have_is_not_found(hub: Hub, tmp_path: Path, text: str) -> None:
    error = await refused(hub, tmp_path, text)
    assert error.code is Code.NOT_FOUND
    assert text in error.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_config.json": None}, "no adapter at its top"),
        ({"adapter_model.safetensors": None}, "its weights are a pickle"),
        ({"adapter_model.safetensors": None, "optimizer.pt": None}, "holds no adapter weights"),
        ({"adapter_setup.json": b"{}"}, "set-up of several adapters"),
    ],
)
async def test_a_repository_without_an_adapter_that_is_taken_is_refused_unfetched(
    hub: Hub, tmp_path: Path, change: dict[str, bytes | None], words: str
) -> None:
    hub.files = {name: data for name, data in ({**hub.files, **change}).items() if data is not None}
    error = await refused(hub, tmp_path)
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD)
    assert words in error.message
    assert hub.fetched == []


async def test_a_repository_that_is_too_large_is_refused_unfetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_BYTES", 1000)
    assert "more than 1000" in (await refused(hub, tmp_path)).message
    hub.sizes["README.md"] = None
    assert "does not say how large" in (await refused(hub, tmp_path)).message
    assert hub.fetched == []


async def test_a_file_of_another_size_than_announced_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.sizes["README.md"] = 7
    assert "another size than the 7 bytes" in (await refused(hub, tmp_path)).message


async def test_a_hub_that_does_not_answer_is_unavailable_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        await HubRepository.parse("hf://org/ner", "http://127.0.0.1:9").fetch(tmp_path)
    assert caught.value.code is Code.UNAVAILABLE
    assert "'hf://org/ner' could not be fetched from the Hugging Face hub" in caught.value.message


@pytest.mark.parametrize(
    "text", ["hf://ner", "hf://a/b/c", "hf://a/b@", "hf://a/b@x y", "org/ner", "hf://../x@y\n"]
)
def test_what_names_no_repository_is_refused(text: str) -> None:
    with pytest.raises(MeshError) as caught:
        HubRepository.parse(text)
    assert caught.value.reason is Reason.INVALID_FIELD
