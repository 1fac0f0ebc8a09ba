"""Versions on their way between two real stores, and through files that anybody may have made."""

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.signing import key_id_of, signed_message
from adaptermesh.client import Code, MeshError, Publication, Reason, StoreClient, VersionState
from adaptermesh.client.moving import copy_version, export_version, import_archive
from adaptermesh.core.digests import digest_bytes
from tests.unit.store.conftest import (
    BASE_NAME,
    Files,
    base_model,
    make_files,
    make_header,
    make_requests,
    refused,
    running_store,
    store_config,
)


@dataclass
class Side:
    """A real store, and a client of it."""

    store: Any
    client: StoreClient

    async def publish(self, seed: int = 1, name: str = "ner", **fields: Any) -> Any:
        files: Files = {
            **make_files(seed),
            "LICENSE": b"mine\n",
            "README.md": b"---\ntags: [card]\n---\n# A card\n",
        }
        return (await self.store.send(make_requests(make_header(files, name=name, **fields), files))).version


@pytest.fixture
async def sides(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Two stores with one base."""
    async with (
        running_store(store_config(tmp_path / "here")) as here,
        running_store(store_config(tmp_path / "there")) as there,
        StoreClient(here.target) as one,
        StoreClient(there.target) as two,
    ):
        for store in (here, there):
            await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        yield Side(here, one), Side(there, two)


def left(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.rglob(pattern))


def refusal(caught: pytest.ExceptionInfo[MeshError]) -> tuple[Code, Reason]:
    return caught.value.code, caught.value.reason


async def files_of(side: Side, ref: str, folder: Path) -> dict[str, bytes]:
    await side.client.download(ref, folder)

    def read() -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    return await asyncio.to_thread(read)


async def test_a_copy_in_another_store_is_the_same_version(sides: tuple[Side, Side], tmp_path: Path) -> None:
    here, there = sides
    said: dict[str, Any] = {
        "task": "ner",
        "description": "finds names",
        "author": "ada",
        "tags": ["z", "a"],
        "license": "mit",
    }
    await here.publish(seed=9)
    version = await here.publish(**said)
    done = await copy_version(here.client, there.client, "acme/ner:v2")
    copied = done.copy.version
    assert (done.copy.created, done.copy.same_digest, done.parents) == (True, True, ())
    assert (copied.ref, copied.digest) == ("acme/ner:v1", version.digest)
    assert (copied.task, copied.description, copied.license) == ("ner", "finds names", "mit")
    assert copied.tags == tuple(version.tags) == ("z", "a", "card")
    mine = await files_of(here, "acme/ner:v2", tmp_path / "mine")
    assert await files_of(there, "acme/ner:v1", tmp_path / "theirs") == mine
    manifests = [(await side.client.resolve_digest(version.digest)).manifest for side in sides]
    assert manifests[0] == manifests[1]
    again = await copy_version(here.client, there.client, f"acme/ner@{version.digest}")
    assert (again.copy.created, again.copy.version.number) == (False, 1)


async def test_a_copy_under_another_name_has_a_digest_of_its_own(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    version = await here.publish()
    done = (await copy_version(here.client, here.client, "acme/ner:v1", "shop/names")).copy
    assert (done.version.ref, done.same_digest, done.source) == ("shop/names:v1", False, "acme/ner:v1")
    assert (done.source_digest, done.version.license) == (version.digest, "mit")
    with pytest.raises(MeshError) as caught:
        await copy_version(here.client, here.client, "acme/ner:v1", "not a name")
    assert caught.value.code is Code.INVALID_ARGUMENT


async def test_signatures_hold_where_their_keys_are_trusted(sides: tuple[Side, Side]) -> None:
    here, there = sides
    version = await here.publish()
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2)]
    publics = [key.public_key().public_bytes_raw() for key in keys]
    for key, public in zip(keys, publics, strict=True):
        await here.client.add_signing_key("acme", public)
        signed = key.sign(signed_message(version.digest))
        await here.client.add_signature(version.digest, key_id_of(public), signed, actor="ada")
    await there.client.add_signing_key("acme", publics[0])
    done = (await copy_version(here.client, there.client, "acme/ner:v1", actor="eve")).copy
    assert (done.signed_by, done.signatures_left) == ((key_id_of(publics[0]),), (key_id_of(publics[1]),))
    (signature,) = await there.client.list_signatures(version.digest)
    assert (signature.key_id, signature.actor) == (key_id_of(publics[0]), "eve")
    renamed = (await copy_version(here.client, there.client, "acme/ner:v1", "acme/other")).copy
    assert (renamed.signed_by, len(renamed.signatures_left)) == ((), 2)


async def test_what_a_version_was_made_from_comes_first_or_the_copy_is_refused(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    one = await here.publish(1, "one")
    two = await here.publish(2, "two", parents=[one.digest])
    three = await here.publish(3, "three", parents=[two.digest, one.digest])
    with pytest.raises(MeshError) as caught:
        await copy_version(here.client, there.client, "acme/three:v1")
    assert refusal(caught) == (Code.FAILED_PRECONDITION, Reason.VERSION_NOT_FOUND)
    assert "was made from acme/one:v1, acme/two:v1, which the store at" in caught.value.message
    assert await there.client.list_adapters() == []
    done = await copy_version(here.client, there.client, "acme/three:v1", "new/three", with_parents=True)
    assert [one.version.ref for one in done.parents] == ["acme/one:v1", "acme/two:v1"]
    manifest = Manifest.from_bytes((await there.client.resolve("new/three:v1")).manifest)
    assert manifest.parents == (two.digest, one.digest)
    again = await copy_version(here.client, there.client, "acme/three:v1", with_parents=True)
    assert (again.parents, again.copy.version.digest) == ((), three.digest)


async def test_a_base_that_is_not_there_is_named_or_comes_along(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, _ = sides
    await here.publish()
    async with running_store(store_config(tmp_path / "empty")) as empty, StoreClient(empty.target) as target:
        with pytest.raises(MeshError) as caught:
            await copy_version(here.client, target, "acme/ner:v1")
        assert refusal(caught) == (Code.NOT_FOUND, Reason.BASE_NOT_FOUND)
        assert BASE_NAME in caught.value.message
        done = await copy_version(here.client, target, "acme/ner:v1", with_base=True)
        assert done.copy.same_digest
        # The same base by another name: another manifest, so another digest, and no refusal.
    async with running_store(store_config(tmp_path / "other")) as other, StoreClient(other.target) as target:
        named = store_pb2.RegisterBaseModelRequest(base_model=base_model("another-name"))
        await other.stub.RegisterBaseModel(named)
        assert not (await copy_version(here.client, target, "acme/ner:v1")).copy.same_digest


async def test_bytes_that_are_damaged_where_they_come_from_go_nowhere(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    version = await here.publish()
    digests = [version.digest, next(f.digest for f in version.source_files if f.path.endswith("tensors"))]
    for digest in digests:
        digits = digest.removeprefix("sha256:")
        blob = tmp_path / "here" / "blobs" / "sha256" / digits[:2] / digits[2:]
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for work in (
            copy_version(here.client, there.client, "acme/ner:v1"),
            export_version(here.client, "acme/ner:v1", tmp_path / "ner.tar"),
        ):
            with pytest.raises(MeshError) as caught:
                await work
            assert refusal(caught) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
        blob.write_bytes(whole)
    assert await there.client.list_adapters() == []
    assert left(tmp_path, "*ner.tar*") == []


async def test_what_must_not_be_used_is_not_copied_nor_exported(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    await here.publish()
    await here.client.set_status("acme/ner:v1", VersionState.REVOKED, reason="bad data")
    with pytest.raises(MeshError) as caught:
        await copy_version(here.client, there.client, "acme/ner:v1")
    assert caught.value.reason is Reason.VERSION_REVOKED
    with pytest.raises(MeshError) as caught:
        await export_version(here.client, "acme/ner:v1", tmp_path / "ner.tar")
    assert caught.value.reason is Reason.VERSION_REVOKED


async def test_an_exported_version_has_the_same_bytes_each_time_and_becomes_itself_again(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    version = await here.publish(tags=["z", "a"], description="finds names")
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    done = await export_version(here.client, "acme/ner:v1", first)
    await export_version(here.client, "acme/ner:v1", second)
    assert first.read_bytes() == second.read_bytes()
    assert done.size_bytes == first.stat().st_size
    with tarfile.open(first) as archive:
        names = archive.getnames()
    files = ["LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert names == ["adapter.json", "manifest.json", *(f"source/{name}" for name in files)]
    checked = await import_archive(there.client, first, validate_only=True)
    assert (checked.version.digest, await there.client.list_adapters()) == (version.digest, [])
    back = await import_archive(there.client, first)
    assert (back.version.digest, back.version.tags) == (version.digest, tuple(version.tags))
    other = await import_archive(there.client, first, "new/name")
    assert (other.version.ref, other.same_digest) == ("new/name:v1", False)
    with pytest.raises(MeshError) as caught:
        await export_version(here.client, "acme/ner:v1", first)
    assert caught.value.code is Code.ALREADY_EXISTS
    assert left(tmp_path, "*.tar*") == ["first.tar", "second.tar"]


Members = dict[str, bytes]


@pytest.fixture
async def exported(sides: tuple[Side, Side], tmp_path: Path) -> Members:
    """What is in the file of an exported version."""
    await sides[0].publish(tags=["t"])
    place = tmp_path / "ner.tar"
    await export_version(sides[0].client, "acme/ner:v1", place)
    found: Members = {}
    with tarfile.open(place) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found


def write(place: Path, members: Members) -> Path:
    with tarfile.open(place, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return place


def about(members: Members, **changes: Any) -> Members:
    return {
        **members,
        "adapter.json": json.dumps({**json.loads(members["adapter.json"]), **changes}).encode(),
    }


def with_manifest(members: Members, change: Callable[[dict[str, Any]], None]) -> Members:
    document = json.loads(members["manifest.json"])
    change(document)
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return {**about(members, digest=digest_bytes(data)), "manifest.json": data}


def _climb(document: dict[str, Any]) -> None:
    document["source"]["files"][0]["path"] = "../../climbed"


def _lie(document: dict[str, Any]) -> None:
    document["description"] = "another one"
    document["cost"]["max_rank"] = 1


FORGERIES: dict[str, Callable[[Members], Members]] = {
    "is missing": lambda members: {k: v for k, v in members.items() if k != "adapter.json"},
    "manifest.json is missing": lambda members: {k: v for k, v in members.items() if k != "manifest.json"},
    "not those that its manifest names": lambda members: {
        k: v for k, v in members.items() if k != "source/LICENSE"
    },
    "files are not those": lambda members: {**members, "source/more.txt": b"x"},
    "are not those that its manifest": lambda members: {**members, "source/LICENSE": b"yours"},
    "has no place in it": lambda members: {**members, "other": b"x"},
    "relative to the adapter's folder": lambda members: {**members, "source/../x": b"x"},
    "1 to 255 printable characters": lambda members: {**members, "source/": b"x"},
    "its manifest has digest": lambda members: about(members, digest=digest_bytes(b"x")),
    "other tags": lambda members: about(members, tags=["other"]),
    "format": lambda members: about(members, format="adaptermesh.version.v2"),
    "surprise": lambda members: about(members, surprise=1),
    "signatures": lambda members: about(members, signatures=[{"key_id": "k", "signature": "zz"}]),
    "is not a legal name": lambda members: about(members, ref="../../x"),
    "Invalid JSON": lambda members: {**members, "adapter.json": b"[" * 100_000},
    "more than 262144": lambda members: {**members, "adapter.json": b" " * 300_000},
    "its files are not those": lambda members: with_manifest(members, _climb),
    "max_rank": lambda members: with_manifest(members, _lie),
}


@pytest.mark.parametrize("words", FORGERIES)
async def test_nothing_in_a_file_is_believed(
    sides: tuple[Side, Side], exported: Members, tmp_path: Path, words: str
) -> None:
    _, there = sides
    place = write(tmp_path / "forged.tar", FORGERIES[words](exported))
    with pytest.raises(MeshError) as caught:
        await import_archive(there.client, place)
    assert caught.value.code in {Code.INVALID_ARGUMENT, Code.DATA_LOSS, Code.FAILED_PRECONDITION}
    assert words in caught.value.message
    assert await there.client.list_adapters() == []
    assert left(tmp_path, "*climbed*") == []


async def test_the_store_publishes_what_the_manifest_describes_or_nothing(
    sides: tuple[Side, Side], exported: Members, tmp_path: Path
) -> None:
    """A manifest that is right by itself, but not of these files."""
    _, there = sides

    def lie(document: dict[str, Any]) -> None:
        document["kind"] = "ia3"

    place = write(tmp_path / "forged.tar", with_manifest(exported, lie))
    with pytest.raises(MeshError) as caught:
        await import_archive(there.client, place)
    assert refusal(caught) == (Code.FAILED_PRECONDITION, Reason.DIGEST_MISMATCH)
    assert await there.client.list_adapters() == []


async def test_a_file_with_an_entry_twice_is_refused(
    sides: tuple[Side, Side], exported: Members, tmp_path: Path
) -> None:
    place = write(tmp_path / "twice.tar", exported)
    data = place.read_bytes()
    # The end of an archive are two empty blocks and what fills its last record.
    place.write_bytes(data[: len(data.rstrip(b"\0")) // 512 * 512 + 512] + data)
    with pytest.raises(MeshError) as caught:
        await import_archive(sides[1].client, place)
    assert "is there twice" in caught.value.message


@pytest.mark.parametrize("what", ["folder", "nothing", "gzip"])
async def test_what_is_no_such_file_is_refused_in_words(
    sides: tuple[Side, Side], tmp_path: Path, what: str
) -> None:
    place = tmp_path / "x.tar"
    if what == "folder":
        place.mkdir()
    elif what == "gzip":
        with tarfile.open(place, "w:gz"):
            pass
    with pytest.raises(MeshError) as caught:
        await import_archive(sides[1].client, place)
    assert refusal(caught) == (Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD)
    assert "no tar of an exported version" in caught.value.message


async def test_a_version_is_published_with_its_expected_digest_or_not_at_all(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    version = await here.publish()
    for digest, reason in ((digest_bytes(b"x"), Reason.DIGEST_MISMATCH), ("x", Reason.INVALID_FIELD)):
        async with refused() as errors:
            await there.publish(expected_digest=digest)
        assert errors[0].reason is reason
    assert (await there.publish(expected_digest=version.digest)).digest == version.digest


async def test_nothing_is_imported_without_what_it_was_made_from(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    one = await here.publish(1, "one")
    await here.publish(2, "two", parents=[one.digest])
    await export_version(here.client, "acme/two:v1", tmp_path / "two.tar")
    with pytest.raises(MeshError) as caught:
        await import_archive(there.client, tmp_path / "two.tar")
    assert refusal(caught) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)
    await copy_version(here.client, there.client, "acme/one:v1")
    assert (await import_archive(there.client, tmp_path / "two.tar")).same_digest


async def test_a_publication_is_what_its_publisher_said(sides: tuple[Side, Side], tmp_path: Path) -> None:
    """What the card adds is part of the version, and so comes along as if it had been said."""
    here, there = sides
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, data in {
        **make_files(5),
        "README.md": b"---\nlicense: mit\ntags: [a, b]\n---\n# Card\n",
    }.items():
        (folder / path).write_bytes(data)
    await here.client.upload(folder, "acme/card", Publication(BASE_NAME, tags=("b", "c")))
    done = (await copy_version(here.client, there.client, "acme/card:v1")).copy
    assert (done.same_digest, done.version.tags) == (True, ("b", "c", "a"))
