"""One version as a tar: what makes the same version elsewhere, in bytes that depend on the version alone.

It holds, in order of their names, `adapter.json` (what it was called, its signatures), `manifest.json` (the
canonical manifest) and `source/...` (the uploaded files, byte for byte); every time and owner in it is zero.
"""

import datetime
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from adaptermesh.artifact.manifest import MAX_MANIFEST_BYTES, Manifest
from adaptermesh.artifact.source_files import MAX_FILES, check_path
from adaptermesh.client.integrity_records import Signature
from adaptermesh.client.package import Package, check_files
from adaptermesh.client.records import SourceFile
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.client.ustar import Entry, damaged, entries
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.refs import parse_ref

FORMAT = "adaptermesh.version.v1"
ABOUT, MANIFEST, SOURCE = "adapter.json", "manifest.json", "source/"
MAX_ABOUT_BYTES = 256 * 1024
_BLOCK = 2**20
_NEVER = datetime.datetime.fromtimestamp(0, datetime.UTC)
_STRICT = ConfigDict(extra="forbid", strict=True)


@checked(frozen=True, slots=True, config=_STRICT)
class _Signature:
    key_id: Annotated[str, Field(max_length=200)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@checked(frozen=True, slots=True, config=_STRICT)
class _About:
    """What the manifest does not say."""

    format: Literal["adaptermesh.version.v1"]
    ref: Annotated[str, Field(max_length=256)]
    digest: Annotated[str, Field(max_length=71)]
    base_model: Annotated[str, Field(max_length=256)]
    task: Annotated[str, Field(max_length=256)]
    description: Annotated[str, Field(max_length=8192)]
    license: Annotated[str, Field(max_length=256)]
    author: Annotated[str, Field(max_length=256)]
    tags: Annotated[list[str], Field(max_length=64)]
    parents: Annotated[list[str], Field(max_length=64)]
    signatures: Annotated[list[_Signature], Field(max_length=64)]


_ABOUT = TypeAdapter(_About)


@dataclass(frozen=True, slots=True)
class _Part:
    """A member of the archive to be: bytes, or a file that has them."""

    data: bytes = b""
    location: Path | None = None


def write_archive(package: Package, place: Path) -> int:
    """Writes a package to a file that must not exist; returns its size. Blocks."""
    parts = {ABOUT: _Part(_about(package)), MANIFEST: _Part(package.manifest.to_bytes())}
    parts |= {SOURCE + file.source.path: _Part(location=file.location) for file in package.files}
    with place.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in sorted(parts):
                _add(archive, name, parts[name])
        return file.tell()


def read_archive(place: Path, room: Path) -> Package:
    """Reads what `write_archive` wrote, from wherever it comes; blocks.

    The files are copied into `room` under numbers. Nothing is taken on trust: the manifest must have the
    digest that it is said to have, and the files must be those that the manifest names.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_UPLOAD), DATA_LOSS (DATA_CORRUPT): what is wrong with it.
    """
    if not place.is_file():
        raise damaged(f"'{place}' is no file")
    with place.open("rb") as file:
        found = _members(file)
        about = _read_about(_bytes(file, found.get(ABOUT), MAX_ABOUT_BYTES, ABOUT))
        data = _bytes(file, found.get(MANIFEST), MAX_MANIFEST_BYTES, MANIFEST)
        if digest_bytes(data) != about.digest:
            raise damaged(f"its manifest has digest {digest_bytes(data)}, not {about.digest}")
        manifest = Manifest.from_bytes(data)
        if sorted(about.tags) != sorted(manifest.tags):
            raise damaged(f"{ABOUT} has other tags than the manifest")
        sources = [entry for name, entry in found.items() if name.startswith(SOURCE)]
        _check_sizes(manifest, sources)
        files = tuple(_copy(file, entry, room / f"{number:04}") for number, entry in enumerate(sources))
    check_files(manifest, files, about.ref)
    parse_ref(about.ref)
    signatures = tuple(Signature(one.key_id, one.signature, "", _NEVER, False) for one in about.signatures)
    return Package(about.ref, manifest, tuple(about.tags), files, signatures)


def _about(package: Package) -> bytes:
    manifest = package.manifest
    document: Mapping[str, Any] = {
        "format": FORMAT,
        "ref": package.ref,
        "digest": manifest.digest,
        "base_model": manifest.base.model_id,
        "task": manifest.task,
        "description": manifest.description,
        "license": manifest.license,
        "author": manifest.author,
        "tags": list(package.tags),
        "parents": list(manifest.parents),
        "signatures": [
            {"key_id": one.key_id, "signature": one.signature}
            for one in sorted(package.signatures, key=lambda one: one.key_id)
        ],
    }
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _add(archive: tarfile.TarFile, name: str, part: _Part) -> None:
    # Its time, owner and group are zero and empty from the start.
    entry = tarfile.TarInfo(name)
    entry.mode = 0o644
    if part.location is None:
        entry.size = len(part.data)
        archive.addfile(entry, io.BytesIO(part.data))
        return
    with part.location.open("rb") as file:
        entry.size = part.location.stat().st_size
        archive.addfile(entry, file)


def _members(file: BinaryIO) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries(file, MAX_FILES + 2):
        if entry.path in found:
            raise damaged(f"the entry {entry.path[:80]!r} is there twice")
        is_source = entry.path.startswith(SOURCE)
        if not is_source and entry.path not in (ABOUT, MANIFEST):
            raise damaged(f"the entry {entry.path[:80]!r} has no place in it")
        if is_source and (problem := check_path(entry.path.removeprefix(SOURCE))) is not None:
            raise damaged(problem)
        found[entry.path] = entry
    return found


def _bytes(file: BinaryIO, entry: Entry | None, limit: int, name: str) -> bytes:
    if entry is None:
        raise damaged(f"{name} is missing")
    if entry.size > limit:
        raise damaged(f"{name} has {entry.size} bytes, more than {limit}")
    file.seek(entry.offset)
    return file.read(entry.size)


def _read_about(data: bytes) -> _About:
    try:
        return _ABOUT.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(f"{ABOUT}: {where[:80]}: {first['msg'][:200]}") from None


def _check_sizes(manifest: Manifest, sources: list[Entry]) -> None:
    """Before a byte is copied."""
    named = {SOURCE + file.path: file.size_bytes for file in manifest.source.files}
    if {entry.path: entry.size for entry in sources} != named:
        raise damaged("its files are not those that its manifest names")


def _copy(file: BinaryIO, entry: Entry, place: Path) -> FolderFile:
    digest = hashlib.sha256()
    file.seek(entry.offset)
    left = entry.size
    with place.open("xb") as copy:
        while block := file.read(min(_BLOCK, left)):
            digest.update(block)
            copy.write(block)
            left -= len(block)
    path = entry.path.removeprefix(SOURCE)
    return FolderFile(place, SourceFile(path, entry.size - left, f"sha256:{digest.hexdigest()}"))
