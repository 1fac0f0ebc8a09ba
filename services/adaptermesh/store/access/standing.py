"""How a caller stands in a namespace, and so what it may do there."""

from dataclasses import dataclass

from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.roles import Permission, permissions_of
from adaptermesh.store.access.caller import Caller, current_caller
from adaptermesh.store.access.records import GrantRecord

# What can be done where nobody has anything yet.
_IN_NOBODYS = frozenset((Permission.READ, Permission.PUBLISH))


@dataclass(frozen=True, slots=True)
class Standing:
    """Whose a namespace is, and what is granted there to one tenant and to everybody."""

    namespace: str
    owner: str | None
    """None: nobody's."""
    grants: tuple[GrantRecord, ...]

    def permissions(self, caller: Caller, name: str = "") -> frozenset[Permission]:
        """What a caller may do with an adapter, or, without a name, with the whole namespace."""
        if not caller.reaches(self.namespace):
            return frozenset()
        if caller.is_operator or self.owner == caller.tenant:
            return caller.permissions
        if self.owner is None:
            return caller.permissions & _IN_NOBODYS
        granted = permissions_of(
            role
            for grant in self.grants
            if grant.is_to(caller.tenant) and grant.name in ("", name)
            for role in grant.roles
        )
        return granted & caller.permissions


def check_permission(permission: Permission, standing: Standing, adapter: AdapterName) -> None:
    """Returns if the caller may do it with an adapter; raises MeshError as `Authority.require`."""
    allowed = standing.permissions(current_caller.get(), adapter.name)
    missing = not_found(Reason.ADAPTER_NOT_FOUND, "adapter", str(adapter))
    check_allowed(permission, allowed, str(adapter), missing)


def denied(permission: Permission, what: str) -> MeshError:
    """PERMISSION_DENIED, with what was missing."""
    caller = current_caller.get()
    return MeshError(
        Code.PERMISSION_DENIED,
        Reason.PERMISSION_DENIED,
        f"key {caller.key_id} may not {permission.value} in {what}",
        metadata={"permission": permission.value, "key_id": caller.key_id, "tenant": caller.tenant},
    )


def check_allowed(
    permission: Permission, allowed: frozenset[Permission], what: str, missing: MeshError
) -> None:
    """Returns if a permission is among those that are allowed; what may not be read is missing."""
    if permission in allowed:
        return
    raise denied(permission, what) if Permission.READ in allowed else missing
