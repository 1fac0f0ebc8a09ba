"""What the catalogue holds, as values. Times are microseconds since the Unix epoch."""

import enum
from dataclasses import dataclass

from adaptermesh.core.alias_action import AliasAction
from adaptermesh.core.policy_scope import tenant_of_scope
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.access.records import AccessRecord


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of an upload, kept byte for byte."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class BaseModelRecord:
    """A base model; its identity is the digest."""

    model_id: str
    digest: str
    config_digest: str
    weights_digest: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    config_json: str


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """What is said of a version after its upload; generation 0 is that nothing was ever said."""

    state: VersionState = VersionState.ACTIVE
    reason: str = ""
    replacement: str = ""
    generation: int = 0
    update_time_us: int = 0
    actor: str = ""


NEVER_SET = VersionStatus()


@dataclass(frozen=True, slots=True)
class Signature:
    """A key's signature of a version's digest, in hexadecimal; it was good when it was added."""

    key_id: str
    signature: str
    create_time_us: int
    actor: str


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A public key that a namespace trusts, in hexadecimal."""

    key_id: str
    public_key: str
    create_time_us: int
    comment: str
    actor: str


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """What must hold in a namespace; generation 0 is that nothing was ever said."""

    namespace: str
    """Or `tenant:<name>`: then it has keys only, which all namespaces of the tenant trust."""
    signatures: SignaturePolicy = SignaturePolicy.NONE
    keys: tuple[SigningKey, ...] = ()
    generation: int = 0
    update_time_us: int = 0
    actor: str = ""

    @property
    def tenant(self) -> str:
        """The tenant whose policy it is; "" for that of a namespace."""
        return tenant_of_scope(self.namespace)

    def key(self, key_id: str) -> SigningKey | None:
        """The trusted key with an id."""
        return next((key for key in self.keys if key.key_id == key_id), None)


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable upload, and its status now. Number 0 is one that was checked but not published."""

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
    create_time_us: int
    source_files: tuple[SourceFile, ...]
    status: VersionStatus = NEVER_SET
    signatures: tuple[Signature, ...] = ()

    @property
    def ref(self) -> str:
        """`namespace/name:v3`."""
        return f"{self.adapter}:v{self.number}"

    @property
    def revoked(self) -> bool:
        return self.status.state is VersionState.REVOKED

    @property
    def adapter(self) -> AdapterName:
        return AdapterName(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class DeletedVersion:
    """What is left of a version that was removed: its number and digest; by whom, when and why."""

    namespace: str
    name: str
    number: int
    digest: str
    delete_time_us: int
    actor: str = ""
    reason: str = ""

    @property
    def ref(self) -> str:
        """`namespace/name:v3`."""
        return f"{self.namespace}/{self.name}:v{self.number}"


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """An alias as it was after one change; of a removal, as it was before."""

    namespace: str
    name: str
    alias: str
    version_number: int
    digest: str
    generation: int
    update_time_us: int
    actor: str
    comment: str
    protected: bool = False
    action: AliasAction = AliasAction.SET

    @property
    def ref(self) -> str:
        """`namespace/name@alias`."""
        return f"{self.namespace}/{self.name}@{self.alias}"


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """One destination of a route."""

    ref: str
    weight: int
    cohort: str


@dataclass(frozen=True, slots=True)
class RouteRecord:
    """A rule: requests of a tenant for a task go to these refs."""

    tenant: str
    task: str
    targets: tuple[RouteTarget, ...]
    generation: int
    update_time_us: int


class ChangeKind(enum.StrEnum):
    """What a mutation did."""

    BASE_MODEL_REGISTERED = "base_model_registered"
    VERSION_PUBLISHED = "version_published"
    VERSION_STATUS_SET = "version_status_set"
    VERSION_SIGNED = "version_signed"
    VERSION_DELETED = "version_deleted"
    NAMESPACE_POLICY_SET = "namespace_policy_set"
    ALIAS_SET = "alias_set"
    ALIAS_DELETED = "alias_deleted"
    ROUTE_SET = "route_set"
    ROUTE_DELETED = "route_deleted"
    TENANT_SET = "tenant_set"
    NAMESPACE_SET = "namespace_set"
    GRANT_SET = "grant_set"
    GRANT_DELETED = "grant_deleted"
    API_KEY_SET = "api_key_set"


Record = (
    BaseModelRecord | VersionRecord | DeletedVersion | AliasRecord | RouteRecord | PolicyRecord | AccessRecord
)


@dataclass(frozen=True, slots=True)
class Change:
    """One mutation, at its place in the feed."""

    position: int
    commit_time_us: int
    kind: ChangeKind
    record: Record


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One adapter in a list."""

    newest: VersionRecord
    version_count: int
    aliases: tuple[AliasRecord, ...]
    unusable_numbers: tuple[int, ...] = ()
    """Of the newest version and of those that an alias points at."""
    download_count: int = 0
    """Of all its versions."""
