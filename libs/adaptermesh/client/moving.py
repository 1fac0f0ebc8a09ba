"""Versions that leave a store, or come to one: copied, exported to a file, imported; needs numpy.

```python
async with StoreClient("store.test:7702") as here, StoreClient("store.prod:7702") as there:
    await copy_version(here, there, "acme/ner:v3", with_parents=True)
    await export_version(here, "acme/ner:v3", Path("ner.tar"))
    await import_archive(there, Path("ner.tar"), "acme/ner-again")
```
"""

import asyncio
import tempfile
from pathlib import Path

from adaptermesh.client.copying import Copier
from adaptermesh.client.fetching import fetch_package
from adaptermesh.client.hub_repository import HubRepository
from adaptermesh.client.package import Package
from adaptermesh.client.publishing import publish_package
from adaptermesh.client.records import Copied, Exported, Imported, Publication, UploadResult
from adaptermesh.client.store import StoreClient
from adaptermesh.client.transfer import ProgressCallback
from adaptermesh.client.version_archive import read_archive, write_archive
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName


async def copy_version(
    source: StoreClient,
    target: StoreClient,
    ref: str,
    adapter: str = "",
    *,
    with_parents: bool = False,
    with_base: bool = False,
    actor: str = "",
    progress: ProgressCallback | None = None,
) -> Copied:
    """Copies a version from one store to another, or to another name in the same one.

    Files, card, tags, licence and what else was said of it are kept, and so is the digest under the same
    name; its number, its status and its aliases are not.

    Args:
        source: the store it comes from.
        target: the store it goes to; may be the same one.
        ref: what to copy.
        adapter: what to call it there, `namespace/name`; "": as here.
        with_parents: what it was made from goes along, under its own names, where it isn't there already.
        with_base: its base model is made known there, too.
        actor: who does it, for the signatures that hold there as well.
        progress: hears of bytes, on their way here and there.
    """
    copier = Copier(
        source, target, with_parents=with_parents, with_base=with_base, actor=actor, progress=progress
    )
    return await copier.copy(ref, AdapterName.parse(adapter) if adapter else None)


async def export_version(
    store: StoreClient, ref: str, place: Path, *, progress: ProgressCallback | None = None
) -> Exported:
    """Writes the version that a ref means to a tar file, which must not exist.

    Its bytes depend on nothing but the version and its signatures.
    """
    _check_free(place)
    found = await store.resolve(ref)
    with tempfile.TemporaryDirectory(prefix="adaptermesh-") as room:
        package = await fetch_package(store, found, Path(room), progress)
        size = await asyncio.to_thread(_write, package, place)
    return Exported(found.version, place, size)


async def import_archive(
    store: StoreClient,
    place: Path,
    adapter: str = "",
    *,
    actor: str = "",
    validate_only: bool = False,
    progress: ProgressCallback | None = None,
) -> Imported:
    """Publishes the version of a tar file that `export_version` wrote, under its name or another one.

    The file may come from anybody: nothing in it is believed, and nothing is published unless the store makes
    the very version of it that the file's manifest describes.
    """
    with tempfile.TemporaryDirectory(prefix="adaptermesh-") as room:
        package = await asyncio.to_thread(read_archive, place, Path(room))
        name = AdapterName.parse(adapter) if adapter else package.adapter
        return await publish_package(
            store, package, name, actor=actor, validate_only=validate_only, progress=progress
        )


async def import_from_hub(
    store: StoreClient,
    repository: str,
    adapter: str,
    publication: Publication,
    *,
    endpoint: str | None = None,
    validate_only: bool = False,
    progress: ProgressCallback | None = None,
) -> UploadResult:
    """Uploads the adapter of `hf://org/name[@revision]` as the next version of `namespace/name`.

    Needs huggingface_hub. Only the files of an adapter at the top of the repository are fetched, no pickle,
    and at most 512 MiB. `endpoint` is another hub than the one that huggingface_hub is set to.
    """
    wanted = HubRepository.parse(repository, endpoint)
    with tempfile.TemporaryDirectory(prefix="adaptermesh-") as room:
        await wanted.fetch(Path(room))
        return await store.upload(room, adapter, publication, validate_only=validate_only, progress=progress)


def _write(package: Package, place: Path) -> int:
    """Under another name until it is whole."""
    part = place.with_name(f".{place.name}.{package.manifest.digest.removeprefix('sha256:')[:16]}.part")
    part.unlink(missing_ok=True)
    try:
        size = write_archive(package, part)
        _check_free(place)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
    return size


def _check_free(place: Path) -> None:
    if place.exists():
        raise MeshError(
            Code.ALREADY_EXISTS,
            Reason.INVALID_FIELD,
            f"'{place}' exists: choose another name, or remove it first",
            metadata={"path": str(place)},
        )
