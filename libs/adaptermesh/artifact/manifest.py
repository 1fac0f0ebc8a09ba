"""The manifest of the canonical form: canonical JSON whose sha256 is an adapter version's identity.

Its fields are complete from the start; those that no ingest fills yet are null or empty. It holds no time of
upload: the same files under the same name on the same base give the same digest everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from adaptermesh.artifact.manifest_checks import check_manifest
from adaptermesh.artifact.manifest_parts import (
    HEADER_LAYER,
    MAX_CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    SCHEMA,
    TENSOR_ALIGNMENT,
    TENSOR_DTYPES,
    Activation,
    BaseRef,
    Chunk,
    Cost,
    ModuleOp,
    Source,
    SourceFile,
    TensorEntry,
    corrupt,
)
from adaptermesh.core.digests import canonical_json, digest_bytes

__all__ = [
    "HEADER_LAYER",
    "MAX_CHUNK_BYTES",
    "MAX_MANIFEST_BYTES",
    "SCHEMA",
    "TENSOR_ALIGNMENT",
    "TENSOR_DTYPES",
    "Activation",
    "BaseRef",
    "Chunk",
    "Cost",
    "Manifest",
    "ModuleOp",
    "Source",
    "SourceFile",
    "TensorEntry",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about one version that never changes. See FORMATS.md, "The canonical form".

    `servable` False means that it is stored and refused at serving with `unservable_reason`; such a manifest
    has no modules and no tensors, unless it is a fusion, which is served in a composition. `same_as_base`
    has, by the site, the `rounded_digest` of each weight that was uploaded as a copy of the base's and is not
    kept: it can be served only where the base's is the same. `languages`, `training_data` and `metrics` are
    what `CardFacts` has of the card.
    """

    namespace: str
    name: str
    base: BaseRef
    source: Source
    kind: str
    size_bytes: int
    modules: tuple[ModuleOp, ...]
    tensors: tuple[TensorEntry, ...]
    chunks: tuple[Chunk, ...]
    cost: Cost
    op_kinds: tuple[str, ...] = ()
    servable: bool = True
    unservable_reason: str = ""
    task: str = ""
    description: str = ""
    author: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    created: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    activation: Activation | None = None
    head: Mapping[str, Any] | None = None
    composition: Mapping[str, Any] | None = None
    parents: tuple[str, ...] = ()
    merge_recipe: Mapping[str, Any] | None = None
    training_data: tuple[Mapping[str, Any], ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()
    golden_probe: Mapping[str, Any] | None = None
    same_as_base: Annotated[Mapping[str, str], Field(exclude_if=lambda value: not value)] = field(
        default_factory=dict
    )
    schema: str = SCHEMA

    @property
    def max_rank(self) -> int:
        """The largest rank over the modules; 0 when no op has one."""
        return self.cost.max_rank

    @property
    def digest(self) -> str:
        """The identity: the digest of `to_bytes()`. Computed anew at each call."""
        return digest_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical JSON."""
        return canonical_json(_ADAPTER.dump_python(self, warnings=False))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Reads a manifest and checks all of it, so that what follows may rely on every number in it.

        Raises:
            MeshError: DATA_LOSS (DATA_CORRUPT) with what is wrong.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise corrupt(f"{len(data)} bytes are more than {MAX_MANIFEST_BYTES}")
        try:
            manifest = _ADAPTER.validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise corrupt(f"{where[:200]}: {first['msg'][:200]}") from None
        try:
            spelling = manifest.to_bytes()
        except ValueError as error:
            raise corrupt(f"it has no canonical spelling: {error}") from None
        # Also catches unknown and repeated keys, which would change the digest but not what was read.
        if spelling != data:
            raise corrupt("it is not in its canonical spelling")
        check_manifest(manifest)
        return manifest


_ADAPTER = TypeAdapter(Manifest)
