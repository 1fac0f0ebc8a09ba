"""A version on its way from one place to another: its files as they were uploaded, what was said of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.client.integrity_records import Signature
from adaptermesh.client.records import Lineage, Publication
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName


@dataclass(frozen=True, slots=True)
class Package:
    """What makes the same version elsewhere; `ref` is what it was called where it comes from."""

    ref: str
    manifest: Manifest
    tags: tuple[str, ...]
    """In the publisher's order, which the manifest does not keep."""
    files: tuple[FolderFile, ...]
    signatures: tuple[Signature, ...] = ()

    @property
    def adapter(self) -> AdapterName:
        """What the manifest calls it."""
        return AdapterName(self.manifest.namespace, self.manifest.name)

    @property
    def publication(self) -> Publication:
        """What its publisher said of it; the base by its digest, which is the same everywhere."""
        manifest = self.manifest
        return Publication(
            base_model=manifest.base.digest,
            task=manifest.task,
            description=manifest.description,
            tags=self.tags,
            license=manifest.license,
            author=manifest.author,
        )

    @property
    def lineage(self) -> Lineage:
        """What it was made from."""
        return Lineage(self.manifest.parents, self.manifest.merge_recipe)

    def digest_as(self, adapter: AdapterName, base_model_id: str) -> str:
        """The digest it has under a name, where its base goes by a name."""
        renamed = dataclasses.replace(
            self.manifest,
            namespace=adapter.namespace,
            name=adapter.name,
            base=dataclasses.replace(self.manifest.base, model_id=base_model_id),
        )
        return renamed.digest


def check_files(manifest: Manifest, files: Sequence[FolderFile], ref: str) -> None:
    """Raises MeshError DATA_LOSS unless the files are those that the manifest names."""
    named = {(file.path, file.size_bytes, file.sha256) for file in manifest.source.files}
    found = {(file.source.path, file.source.size_bytes, file.source.digest) for file in files}
    if named != found:
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"the files of '{ref}' are not those that its manifest names",
            metadata={"ref": ref},
        )
