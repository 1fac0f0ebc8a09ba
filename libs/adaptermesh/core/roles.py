"""Who may do what: the roles of API keys and grants, and what each allows."""

import enum
from collections.abc import Iterable

DEFAULT_TENANT = "default"
"""Whose the namespaces are that nobody has given to another tenant."""

MESH_TENANT = "*"
"""In the place of a tenant: of a key, that it is an operator's, for the whole mesh; of a grant, everybody."""


class Permission(enum.StrEnum):
    """What a call needs."""

    READ = "read"
    """See, download, resolve and use versions."""
    PUBLISH = "publish"
    """Upload and sign versions."""
    DEPLOY = "deploy"
    """Move aliases, set routes, say whether a version should be used."""
    ADMINISTER = "administer"
    """Remove versions, move protected aliases, give keys and grants, read the audit log."""


class Role(enum.StrEnum):
    """What a key or a grant allows. Several add up."""

    READER = "reader"
    PUBLISHER = "publisher"
    DEPLOYER = "deployer"
    ADMIN = "admin"


_ALLOWED = {
    Role.READER: frozenset((Permission.READ,)),
    Role.PUBLISHER: frozenset((Permission.READ, Permission.PUBLISH)),
    Role.DEPLOYER: frozenset((Permission.READ, Permission.DEPLOY)),
    Role.ADMIN: frozenset(Permission),
}


def permissions_of(roles: Iterable[Role]) -> frozenset[Permission]:
    """All that some roles allow together."""
    return frozenset[Permission]().union(*(_ALLOWED[role] for role in roles))
