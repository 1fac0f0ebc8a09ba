"""Roles on the wire: the same for store, router, gateway and client."""

from collections.abc import Iterable

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.roles import Role

_MESSAGES = {
    Role.READER: access_pb2.ROLE_READER,
    Role.PUBLISHER: access_pb2.ROLE_PUBLISHER,
    Role.DEPLOYER: access_pb2.ROLE_DEPLOYER,
    Role.ADMIN: access_pb2.ROLE_ADMIN,
}
_ROLES: dict[int, Role] = {number: role for role, number in _MESSAGES.items()}


def role_messages(roles: Iterable[Role]) -> list[access_pb2.Role.ValueType]:
    return [_MESSAGES[role] for role in roles]


def roles_of(numbers: Iterable[int]) -> tuple[Role, ...]:
    """The roles behind some numbers; one that only a newer store knows allows nothing here."""
    return tuple(_ROLES[number] for number in numbers if number in _ROLES)


def roles_from(numbers: Iterable[int]) -> tuple[Role, ...]:
    """The roles that were asked for; raises MeshError INVALID_FIELD for one that is none."""
    wanted = tuple(numbers)
    found = roles_of(wanted)
    if len(found) != len(wanted):
        raise invalid_field("roles", "must be reader, publisher, deployer or admin")
    return tuple(sorted(set(found)))
