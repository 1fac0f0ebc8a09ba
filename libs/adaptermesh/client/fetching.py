"""A version of a store as a package: everything that makes the same version elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.client.package import Package, check_files
from adaptermesh.client.records import ResolvedRef
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.client.transfer import Progress, ProgressCallback, fetch_file
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason

if TYPE_CHECKING:
    from adaptermesh.client.store import StoreClient


def read_manifest(found: ResolvedRef) -> Manifest:
    """The manifest of a version; raises MeshError DATA_LOSS if it isn't the one of its digest."""
    if digest_bytes(found.manifest) != found.version.digest:
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"the manifest of '{found.version.ref}' arrived as {digest_bytes(found.manifest)}",
            metadata={"digest": found.version.digest},
        )
    return Manifest.from_bytes(found.manifest)


async def fetch_package(
    store: "StoreClient", found: ResolvedRef, room: Path, progress: ProgressCallback | None
) -> Package:
    """Brings the files of a version into `room`, verified, one after the other in bounded memory.

    Their names there are numbers: what a store calls a file never becomes a path here.
    """
    version, files, done = found.version, [], 0
    total = sum(file.size_bytes for file in version.source_files)
    for number, file in enumerate(version.source_files):
        place, before, path = room / f"{number:04}", done, file.path

        def on_bytes(count: int, before: int = before, path: str = path) -> None:
            if progress is not None:
                progress(Progress(path, before + count, total))

        await fetch_file(file, place, store.file_stream(version.digest, file.path), on_bytes)
        files.append(FolderFile(place, file))
        done += file.size_bytes
    manifest = read_manifest(found)
    check_files(manifest, files, version.ref)
    signatures = tuple(await store.list_signatures(version.digest))
    return Package(version.ref, manifest, version.tags, tuple(files), signatures)
