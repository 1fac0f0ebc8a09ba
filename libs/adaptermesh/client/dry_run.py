"""An upload tried out without a store: every check of the files, and what it would become. Needs numpy."""

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import IngestResult, SourceBundle, ingest
from adaptermesh.artifact.merging_recipe import MergeRecipe
from adaptermesh.client.records import Publication, SourceFile
from adaptermesh.client.source_folder import FolderFile, read_folder
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.refs import AdapterName, check_name

DEFAULT_MOST_BYTES = 512 * 2**20
"""What a store takes unless it is set otherwise."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What would be uploaded, and the version that it would become.

    `digest` is the version's, on the base `base_model_id`; `size_bytes` the size of its canonical tensors,
    `upload_bytes` that of the files. `sites` are the places where it acts.
    """

    adapter: str
    digest: str
    base_model_id: str
    base_digest: str
    kind: str
    op_kinds: tuple[str, ...]
    max_rank: int
    sites: tuple[str, ...]
    modules: int
    size_bytes: int
    upload_bytes: int
    servable: bool
    unservable_reason: str
    license: str
    tags: tuple[str, ...]
    warnings: tuple[str, ...]
    files: tuple[SourceFile, ...]


async def dry_run(
    folder: Path | str,
    adapter: str,
    publication: Publication,
    base: BaseFacts,
    *,
    parents: Sequence[str] = (),
    merge_recipe: Mapping[str, Any] | None = None,
) -> DryRun:
    """Runs every check that a store runs on the files, and publishes nothing.

    What only a store knows stays unchecked: whether it has the base and the parents, and its limits.

    Raises:
        MeshError: INVALID_ARGUMENT with every reason for which a store would refuse it, among others.
    """
    name = AdapterName.parse(adapter)
    if publication.task:
        check_name(publication.task, "task")
    with tempfile.TemporaryDirectory(prefix="adaptermesh-") as room:
        files = await read_folder(Path(folder), Path(room))
        bundle = SourceBundle(
            files={file.source.path: file.location for file in files},
            namespace=name.namespace,
            name=name.name,
            task=publication.task,
            description=publication.description,
            tags=publication.tags,
            license=publication.license,
            author=publication.author,
            parents=tuple(parents),
            merge_recipe=None if merge_recipe is None else MergeRecipe.from_json(json.dumps(merge_recipe)),
        )
        result = await asyncio.to_thread(ingest, bundle, base, Path(room) / "canonical.safetensors")
    return _described(adapter, base, files, result)


def _described(adapter: str, base: BaseFacts, files: Sequence[FolderFile], result: IngestResult) -> DryRun:
    manifest = result.manifest
    upload_bytes = sum(file.source.size_bytes for file in files)
    large = upload_bytes > DEFAULT_MOST_BYTES
    warning = f"the files have more than {DEFAULT_MOST_BYTES} bytes, which a store takes only if it is set so"
    return DryRun(
        adapter=adapter,
        digest=digest_bytes(manifest.to_bytes()),
        base_model_id=base.model_id,
        base_digest=base.digest,
        kind=manifest.kind,
        op_kinds=tuple(manifest.op_kinds),
        max_rank=manifest.max_rank,
        sites=tuple(sorted({module.site for module in manifest.modules})),
        modules=len(manifest.modules),
        size_bytes=manifest.size_bytes,
        upload_bytes=upload_bytes,
        servable=manifest.servable,
        unservable_reason=manifest.unservable_reason,
        license=manifest.license,
        tags=tuple(manifest.tags),
        warnings=(*result.warnings, *([warning] if large else [])),
        files=tuple(file.source for file in files),
    )
