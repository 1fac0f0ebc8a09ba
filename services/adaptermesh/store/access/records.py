"""Tenants, namespaces, keys and grants as values. Times are microseconds since the Unix epoch; 0: never."""

from dataclasses import dataclass

from adaptermesh.core.roles import MESH_TENANT, Role


@dataclass(frozen=True, slots=True)
class Quotas:
    """What a tenant may use; 0 is no bound."""

    max_bytes: int = 0
    max_versions: int = 0
    max_requests_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """Whom namespaces and keys belong to; generation 0 is that nothing was ever said of it."""

    name: str
    quotas: Quotas = Quotas()
    generation: int = 0
    update_time_us: int = 0
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What there is in a namespace, or in all of a tenant's."""

    bytes: int = 0
    versions: int = 0


@dataclass(frozen=True, slots=True)
class NamespaceRecord:
    """Whose a namespace is."""

    name: str
    tenant: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class GrantRecord:
    """What a tenant, or everybody, may do in a namespace or with one adapter of it."""

    namespace: str
    name: str
    """Empty: with all adapters of the namespace."""
    grantee: str
    roles: tuple[Role, ...]
    update_time_us: int = 0
    actor: str = ""

    def is_to(self, tenant: str) -> bool:
        """Whether it is granted to a tenant, or to everybody."""
        return self.grantee in (tenant, MESH_TENANT)


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """An API key without its secret."""

    key_id: str
    tenant: str
    roles: tuple[Role, ...]
    namespaces: tuple[str, ...] = ()
    """It is good in these only. Empty: in all."""
    comment: str = ""
    create_time_us: int = 0
    expire_time_us: int = 0
    revoke_time_us: int = 0
    last_use_time_us: int = 0
    actor: str = ""


AccessRecord = TenantRecord | NamespaceRecord | GrantRecord | ApiKeyRecord
