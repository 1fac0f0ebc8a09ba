"""What the store keeps, as the SDK shows it: plain frozen records, no protobuf."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptermesh.artifact.differences import (
    FieldDifference,
    MetricDifference,
    ModuleDifference,
    TensorChange,
)
from adaptermesh.core.alias_action import AliasAction
from adaptermesh.core.version_state import VersionState


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of an upload, kept byte for byte."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """What is said of a version after its upload: `state` is active, deprecated or revoked, and why.

    `replacement` is a ref of what to use instead, or empty. `generation` is 0 if nothing was ever said; then
    `update_time` is None.
    """

    state: VersionState = VersionState.ACTIVE
    reason: str = ""
    replacement: str = ""
    generation: int = 0
    update_time: datetime.datetime | None = None
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable upload of an adapter; `digest` is its identity. Only status and signatures change."""

    namespace: str
    name: str
    number: int
    digest: str
    base_digest: str
    base_model_id: str
    task: str
    description: str
    tags: tuple[str, ...]
    license: str
    kind: str
    op_kinds: tuple[str, ...]
    max_rank: int
    size_bytes: int
    servable: bool
    unservable_reason: str
    warnings: tuple[str, ...]
    create_time: datetime.datetime
    source_files: tuple[SourceFile, ...]
    status: VersionStatus = field(default_factory=VersionStatus)
    signing_key_ids: tuple[str, ...] = ()

    @property
    def adapter(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def ref(self) -> str:
        """`namespace/name:v3`."""
        return f"{self.adapter}:v{self.number}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable pointer to a version, as it was after its `generation`-th change, which was `action`.

    One that is `protected` moves, and is removed, only when the caller acknowledges that.
    """

    namespace: str
    name: str
    alias: str
    version_number: int
    digest: str
    generation: int
    update_time: datetime.datetime
    actor: str
    comment: str
    protected: bool = False
    action: AliasAction = AliasAction.SET

    @property
    def ref(self) -> str:
        """`namespace/name@alias`."""
        return f"{self.namespace}/{self.name}@{self.alias}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter in a list: its newest version and its aliases."""

    newest: Version
    version_count: int
    aliases: tuple[Alias, ...]
    unusable_numbers: tuple[int, ...] = ()
    """Of the newest version and of those that an alias points at: revoked, or not signed as they must be."""
    download_count: int = 0
    """Of all its versions."""

    @property
    def name(self) -> str:
        """`namespace/name`."""
        return self.newest.adapter


@dataclass(frozen=True, slots=True)
class Search:
    """Conditions that must all hold of an adapter's newest version; an empty one matches all.

    `text` are words, each of which must begin a word of the name, the tags, the description or the card.
    `order` is "relevance", "newest" (or "date"), "name", "downloads" or "score"; empty: by relevance where
    there are words, else newest first. By score only those are found whose card has the `score_metric`,
    "accuracy" unless it is set; "task/metric" is that of one task.
    """

    text: str = ""
    namespace: str = ""
    base_model: str = ""
    task: str = ""
    kind: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    order: str = ""
    with_facets: bool = False
    language: str = ""
    tenant: str = ""
    score_metric: str = ""
    lowest_score_first: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found, and how many of all that match have each value of a field."""

    adapters: tuple[Adapter, ...]
    facets: Mapping[str, tuple[tuple[str, int], ...]]
    more: bool
    """Whether there are more than these."""


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """One destination of a route; `weight` is relative to the other targets."""

    ref: str
    weight: int = 1
    cohort: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """A rule: requests of `tenant` ("*" for all) for `task` go to `targets`."""

    tenant: str
    task: str
    targets: tuple[RouteTarget, ...]
    generation: int
    update_time: datetime.datetime


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen base model; `digest` is its identity, `model_id` its human name."""

    model_id: str
    digest: str
    config_digest: str
    weights_digest: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ResolvedRef:
    """What a ref means now; `manifest` is the canonical manifest, whose sha256 is the version's digest."""

    version: Version
    aliases: tuple[str, ...]
    manifest: bytes


@dataclass(frozen=True, slots=True)
class Publication:
    """What the publisher says about an upload. `base_model` is a base's name or digest."""

    base_model: str
    task: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    license: str = ""
    author: str = ""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What an upload was made from: digests of versions on the same base, and how it was merged if it was."""

    parents: tuple[str, ...] = ()
    merge_recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class UploadResult:
    """`created` is False if the same content was there before (or for a check without publishing).

    `resumed_bytes` had been sent before, by a call that came to no end.
    """

    version: Version
    created: bool
    feed_position: int
    resumed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """A version that came from elsewhere, where it was `source` with the digest `source_digest`.

    `created` is False if it was there before. Signatures hold where the digest is the same: `signed_by` are
    the keys that the namespace trusts here, too, `signatures_left` those whose signatures were left behind.
    """

    version: Version
    created: bool
    feed_position: int
    source: str
    source_digest: str
    signed_by: tuple[str, ...] = ()
    signatures_left: tuple[str, ...] = ()

    @property
    def same_digest(self) -> bool:
        """Whether it is the very same version as there."""
        return self.version.digest == self.source_digest


@dataclass(frozen=True, slots=True)
class Copied:
    """A version that was copied, and what was copied before it because it was made from that."""

    copy: Imported
    parents: tuple[Imported, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """A version in a tar file."""

    version: Version
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Merge:
    """What to merge and how.

    `members` are refs with their weights; a weight of 0 drops its member. `method` is "linear", "average",
    "svd", "ties" or "dare" (`adaptermesh/artifact/merging.py` says what each computes). `rank` belongs to the
    last three, `density` to the last two, `seed` to dare (0 if left out).
    """

    members: tuple[tuple[str, float], ...]
    method: str = "linear"
    rank: int | None = None
    density: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class MergedMember:
    """A version that took part in a merge; `ref` is its exact version."""

    ref: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The version that a merge became, and what it is made of.

    `created` is False if the same merge was there before (or for a check without publishing). `kept` is the
    share of the squared norm of all weight changes that cutting to the rank left, 1 where nothing was cut;
    `least_kept` that of the module `least_kept_module`, which lost most.
    """

    version: Version
    created: bool
    feed_position: int
    members: tuple[MergedMember, ...]
    method: str
    rank: int | None
    density: float | None
    seed: int | None
    modules: int
    max_rank: int
    kept: float
    least_kept: float
    least_kept_module: str


@dataclass(frozen=True, slots=True)
class VersionDifference:
    """Two versions side by side; each list has what differs, `metrics` whatever one of them names.

    `tensors` has every module that both have in equal shapes, with the relative change; None if the bytes of
    one can't be had.
    """

    a: Version
    b: Version
    fields: tuple[FieldDifference, ...]
    modules: tuple[ModuleDifference, ...]
    metrics: tuple[MetricDifference, ...]
    tensors: tuple[TensorChange, ...] | None


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias after a move; give `feed_position` to a request that must see it."""

    alias: Alias
    feed_position: int


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A version after its status was set; give `feed_position` to a request that must see it."""

    version: Version
    feed_position: int


@dataclass(frozen=True, slots=True)
class DeletedVersion:
    """What is left of a version that was removed: its number, which no other one gets; who, when and why."""

    namespace: str
    name: str
    number: int
    digest: str
    delete_time: datetime.datetime
    actor: str
    reason: str

    @property
    def ref(self) -> str:
        """`namespace/name:v3`."""
        return f"{self.namespace}/{self.name}:v{self.number}"


@dataclass(frozen=True, slots=True)
class Removal:
    """A version after its removal; give `feed_position` to a request that must see it."""

    deleted: DeletedVersion
    feed_position: int


@dataclass(frozen=True, slots=True)
class StatusHistory:
    """Every status that a version ever had, newest first, and its removal if it was removed."""

    ref: str
    statuses: tuple[VersionStatus, ...]
    deletion: DeletedVersion | None


@dataclass(frozen=True, slots=True)
class RouteChange:
    """A route after a change; give `feed_position` to a request that must see it."""

    route: Route
    feed_position: int
