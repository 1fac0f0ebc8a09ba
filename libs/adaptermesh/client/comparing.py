"""Two versions side by side: fetched into a temporary folder and compared in a thread."""

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from adaptermesh.artifact.comparing import (
    compare_fields,
    compare_metrics,
    compare_modules,
    compare_tensors,
)
from adaptermesh.artifact.differences import TensorChange
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.client.records import ResolvedRef, VersionDifference
from adaptermesh.client.transfer import ProgressCallback
from adaptermesh.core.version_state import VersionState

if TYPE_CHECKING:
    from adaptermesh.client.store import StoreClient


async def compare(
    store: "StoreClient", a: str, b: str, progress: ProgressCallback | None
) -> VersionDifference:
    """What differs between the versions that two refs mean."""
    one, other = [await store.resolve(ref, include_unusable=True) for ref in (a, b)]
    manifests = Manifest.from_bytes(one.manifest), Manifest.from_bytes(other.manifest)
    return VersionDifference(
        a=one.version,
        b=other.version,
        fields=compare_fields(*manifests),
        modules=compare_modules(*manifests),
        metrics=compare_metrics(*manifests),
        tensors=await _tensors(store, (one, other), manifests, progress),
    )


async def _tensors(
    store: "StoreClient",
    versions: tuple[ResolvedRef, ResolvedRef],
    manifests: tuple[Manifest, Manifest],
    progress: ProgressCallback | None,
) -> tuple[TensorChange, ...] | None:
    if any(one.version.status.state is VersionState.REVOKED for one in versions):
        return None
    if not all(manifest.tensors for manifest in manifests):
        return ()
    with tempfile.TemporaryDirectory(prefix="adaptermesh-") as folder:
        places = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        for one, place in zip(versions, places, strict=True):
            await store.fetch(one.version.digest, place, progress=progress)
        return await asyncio.to_thread(compare_tensors, *manifests, *places)
