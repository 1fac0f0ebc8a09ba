"""Rows of the catalogue to records and back."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select

from adaptermesh.core.alias_action import AliasAction
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.records import (
    NEVER_SET,
    AliasRecord,
    BaseModelRecord,
    DeletedVersion,
    PolicyRecord,
    RouteRecord,
    RouteTarget,
    Signature,
    SigningKey,
    SourceFile,
    VersionRecord,
    VersionStatus,
)
from adaptermesh.store.schema import (
    adapters,
    alias_moves,
    aliases,
    deleted_versions,
    version_signatures,
    version_statuses,
    versions,
)

_STATUS = "status_"
_STATUS_NAMES = tuple(field.name for field in dataclasses.fields(VersionStatus) if field.name != "state")
SELECT_VERSIONS = (
    select(
        versions,
        adapters.c.namespace,
        adapters.c.name,
        adapters.c.version_count,
        adapters.c.deleted_count,
        adapters.c.download_count.label("adapter_downloads"),
        *(column.label(_STATUS + column.name) for column in version_statuses.c if not column.primary_key),
        version_signatures.c.entries.label("signatures"),
    )
    .join(adapters, adapters.c.id == versions.c.adapter_id)
    .outerjoin(version_statuses, version_statuses.c.version_id == versions.c.id)
    .outerjoin(version_signatures, version_signatures.c.version_id == versions.c.id)
)
"""Versions with their adapter's name, status and signatures."""

SAME_MOVE = (
    (aliases.c.adapter_id == alias_moves.c.adapter_id)
    & (aliases.c.alias == alias_moves.c.alias)
    & (aliases.c.generation == alias_moves.c.generation)
)

SELECT_MOVES = select(alias_moves, adapters.c.namespace, adapters.c.name).join(
    adapters, adapters.c.id == alias_moves.c.adapter_id
)
"""Moves of aliases, with the adapter's name."""

SELECT_ALIASES = SELECT_MOVES.join(aliases, SAME_MOVE)
"""Of each alias the move that holds now."""

SELECT_DELETED = select(deleted_versions, adapters.c.namespace, adapters.c.name).join(
    adapters, adapters.c.id == deleted_versions.c.adapter_id
)
"""Versions that were removed, with the adapter's name."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version and what only the store knows of it."""

    record: VersionRecord
    tensor_digest: str
    feed_position: int


def stored_version(row: Any) -> StoredVersion:
    return StoredVersion(version_record(row), row.tensor_digest, row.feed_position)


def version_record(row: Any) -> VersionRecord:
    return VersionRecord(
        namespace=row.namespace,
        name=row.name,
        number=row.number,
        digest=row.digest,
        base_digest=row.base_digest,
        base_model_id=row.base_model_id,
        task=row.task,
        description=row.description,
        tags=tuple(row.tags),
        license=row.license,
        kind=row.kind,
        op_kinds=tuple(row.op_kinds),
        max_rank=row.max_rank,
        size_bytes=row.size_bytes,
        servable=row.servable,
        unservable_reason=row.unservable_reason,
        warnings=tuple(row.warnings),
        create_time_us=row.create_time_us,
        source_files=tuple(SourceFile(**file) for file in row.source_files),
        status=_status(row),
        signatures=tuple(Signature(**entry) for entry in row.signatures or ()),
    )


def deleted_version(row: Row[Any]) -> DeletedVersion:
    return DeletedVersion(
        namespace=row.namespace,
        name=row.name,
        number=row.number,
        digest=row.digest,
        delete_time_us=row.delete_time_us,
        actor=row.actor,
        reason=row.reason,
    )


def _status(row: Any) -> VersionStatus:
    if row.status_generation is None:
        return NEVER_SET
    values = {name: getattr(row, _STATUS + name) for name in _STATUS_NAMES}
    return VersionStatus(state=VersionState(row.status_state), **values)


def status_record(row: Row[Any]) -> VersionStatus:
    """Of the history of a version's statuses."""
    return VersionStatus(
        state=VersionState(row.state),
        reason=row.reason,
        replacement=row.replacement,
        generation=row.generation,
        update_time_us=row.update_time_us,
        actor=row.actor,
    )


def version_values(record: VersionRecord) -> dict[str, Any]:
    """The columns of `versions` that a record fills."""
    values = dataclasses.asdict(record)
    for elsewhere in ("namespace", "name", "status", "signatures"):
        del values[elsewhere]
    return values


def alias_record(row: Row[Any]) -> AliasRecord:
    return AliasRecord(
        namespace=row.namespace,
        name=row.name,
        alias=row.alias,
        version_number=row.version_number,
        digest=row.digest,
        generation=row.generation,
        update_time_us=row.update_time_us,
        actor=row.actor,
        comment=row.comment,
        protected=row.protected,
        action=AliasAction(row.action),
    )


def base_model_record(row: Row[Any]) -> BaseModelRecord:
    fields = (field.name for field in dataclasses.fields(BaseModelRecord))
    return BaseModelRecord(**{name: getattr(row, name) for name in fields})


def route_record(row: Row[Any]) -> RouteRecord:
    targets = tuple(RouteTarget(**target) for target in row.targets)
    return RouteRecord(row.tenant, row.task, targets, row.generation, row.update_time_us)


def policy_record(row: Any) -> PolicyRecord:
    return PolicyRecord(
        namespace=row.namespace,
        signatures=SignaturePolicy(row.signatures),
        keys=tuple(SigningKey(**key) for key in row.keys),
        generation=row.generation,
        update_time_us=row.update_time_us,
        actor=row.actor,
    )
