"""What a caller sees of lists and searches."""

from sqlalchemy import ColumnElement, exists, select

from adaptermesh.core.roles import MESH_TENANT
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.schema import adapters, grants, namespaces


def visible() -> ColumnElement[bool] | None:
    """The condition on `adapters` that leaves what the caller may see; None leaves everything."""
    caller = current_caller.get()
    if caller.sees_everything:
        return None
    here = namespaces.c.name == adapters.c.namespace
    if caller.is_operator:
        return adapters.c.namespace.in_(caller.namespaces)
    own = exists(select(namespaces.c.name).where(here & (namespaces.c.tenant == caller.tenant)))
    granted = exists(
        select(grants.c.namespace).where(
            (grants.c.namespace == adapters.c.namespace)
            & ((grants.c.name == "") | (grants.c.name == adapters.c.name))
            & grants.c.grantee.in_((caller.tenant, MESH_TENANT))
        )
    )
    seen = own | granted
    return seen & adapters.c.namespace.in_(caller.namespaces) if caller.namespaces else seen


def caller_scope() -> list[str | list[str]]:
    """Tells lists of different callers apart: a page token of one is none of another."""
    caller = current_caller.get()
    return [] if caller.sees_everything else [caller.tenant, sorted(caller.namespaces)]
