"""What the store says of tenants, keys, grants and the audit log."""

import datetime
from dataclasses import dataclass, field

from adaptermesh.core.roles import Role


@dataclass(frozen=True, slots=True)
class Usage:
    """How much there is."""

    bytes: int
    """Of the versions, as uploaded and as served together."""
    versions: int


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom namespaces and keys belong to; a quota of 0 is no bound."""

    name: str
    max_bytes: int
    max_versions: int
    max_requests_per_minute: int
    generation: int
    update_time: datetime.datetime | None
    actor: str
    usage: Usage | None = None
    """Of all its namespaces; None where nobody asked."""


@dataclass(frozen=True, slots=True)
class TenantChange:
    """A tenant as it is now."""

    tenant: Tenant
    feed_position: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace and whose it is."""

    name: str
    tenant: str
    usage: Usage | None = None
    """None where nobody asked."""


@dataclass(frozen=True, slots=True)
class NamespaceChange:
    """A namespace as it is now."""

    namespace: Namespace
    feed_position: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What a tenant, or everybody ("*"), may do in a namespace or with one adapter of it."""

    namespace: str
    name: str
    """Empty: all adapters of the namespace."""
    grantee: str
    roles: tuple[Role, ...]
    update_time: datetime.datetime | None
    actor: str

    @property
    def subject(self) -> str:
        """`namespace/name`, or `namespace/*`."""
        return f"{self.namespace}/{self.name or '*'}"


@dataclass(frozen=True, slots=True)
class GrantChange:
    """A grant as it is now."""

    grant: Grant
    feed_position: int


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret."""

    key_id: str
    tenant: str
    """"*" for an operator's."""
    roles: tuple[Role, ...]
    namespaces: tuple[str, ...]
    """It is good in these only. Empty: in all."""
    comment: str
    create_time: datetime.datetime | None
    expire_time: datetime.datetime | None
    revoke_time: datetime.datetime | None
    last_use_time: datetime.datetime | None
    actor: str


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key that was just made. Nobody can tell its secret again."""

    key: ApiKey
    secret: str = field(repr=False)
    feed_position: int


@dataclass(frozen=True, slots=True)
class ApiKeyChange:
    """A key as it is now; position 0: nothing was changed."""

    key: ApiKey
    feed_position: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key stands for."""

    key_id: str
    """Empty where no key is asked for."""
    tenant: str
    roles: tuple[Role, ...]
    namespaces: tuple[str, ...]
    expire_time: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Conditions that must all hold; an empty one matches all."""

    namespace: str = ""
    subject_prefix: str = ""
    action: str = ""
    key_id: str = ""
    from_time: datetime.datetime | None = None
    until_time: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change and who made it."""

    feed_position: int
    time: datetime.datetime | None
    action: str
    subject: str
    namespace: str
    tenant: str
    key_id: str
    """The key that was shown."""
    key_tenant: str
    actor: str
    """Who the caller said it was."""
