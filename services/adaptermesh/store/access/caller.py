"""Who makes the call that is being answered."""

from contextvars import ContextVar
from dataclasses import dataclass

from adaptermesh.core.roles import MESH_TENANT, Permission, Role, permissions_of
from adaptermesh.store.access.records import ApiKeyRecord


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant, by one of its keys."""

    key_id: str
    tenant: str
    roles: tuple[Role, ...]
    namespaces: tuple[str, ...] = ()
    """The key is good in these only. Empty: in all."""
    expire_time_us: int = 0
    max_requests_per_minute: int = 0
    """Of the tenant; 0 is no bound."""

    @property
    def permissions(self) -> frozenset[Permission]:
        return permissions_of(self.roles)

    @property
    def is_operator(self) -> bool:
        """Whether it acts for the whole mesh."""
        return self.tenant == MESH_TENANT

    @property
    def sees_everything(self) -> bool:
        return self.is_operator and not self.namespaces

    def reaches(self, namespace: str) -> bool:
        """Whether its key is good in a namespace at all."""
        return not self.namespaces or namespace in self.namespaces


ANYBODY = Caller(key_id="", tenant=MESH_TENANT, roles=(Role.ADMIN,))
"""Who calls a store that asks for no keys."""

current_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
"""Set for each call before anything is done for it. A variable of the context and no argument, because the
audit log wants it below every mutation, also in the tasks that finish one."""


def caller_of(key: ApiKeyRecord, max_requests_per_minute: int) -> Caller:
    """Whom a key stands for."""
    return Caller(
        key.key_id, key.tenant, key.roles, key.namespaces, key.expire_time_us, max_requests_per_minute
    )
