"""What a policy is of: a namespace, or, for trusted keys, all namespaces of a tenant."""

from adaptermesh.core.refs import check_name

_TENANT = "tenant:"


def tenant_scope(tenant: str) -> str:
    """What the policy of a tenant goes by; no namespace has such a name."""
    return _TENANT + tenant


def tenant_of_scope(scope: str) -> str:
    """The tenant whose policy it is; "" for that of a namespace."""
    return scope.removeprefix(_TENANT) if scope.startswith(_TENANT) else ""


def check_scope(scope: str) -> str:
    """Returns it if it is `<namespace>` or `tenant:<tenant>`; raises MeshError INVALID_NAME."""
    tenant = tenant_of_scope(scope)
    if scope.startswith(_TENANT):
        check_name(tenant, "tenant")
    else:
        check_name(scope, "namespace")
    return scope
