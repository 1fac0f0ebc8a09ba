"""Errors for people: what failed, why, and what to do about it."""

from adaptermesh.cli.output import Output
from adaptermesh.client import Code, MeshError, Reason

_START = "start one with `adaptermesh up`, or name another address"
_HINTS = {
    Reason.TASK_NOT_FOUND: "`adaptermesh routes ls` lists the tasks, `adaptermesh routes set` adds one",
    Reason.ROUTE_NOT_FOUND: "`adaptermesh routes ls` lists the routes",
    Reason.ADAPTER_NOT_FOUND: "`adaptermesh adapters ls` lists the adapters",
    Reason.VERSION_NOT_FOUND: "`adaptermesh adapters show NAMESPACE/NAME` lists the versions",
    Reason.VERSION_DELETED: "use another version; `adaptermesh adapters show NAMESPACE/NAME` lists them",
    Reason.VERSION_IN_USE: "move or remove what uses it first, or take it out of use with `adapters revoke`",
    Reason.ALIAS_NOT_FOUND: "set it with `adaptermesh alias set` (a plain namespace/name means @latest)",
    Reason.BASE_NOT_FOUND: "`adaptermesh status` lists the base models that workers serve",
    Reason.BASE_MISMATCH: "`adaptermesh adapters show REF` names the base that a version was trained on",
    Reason.INVALID_REF: "refs are namespace/name:v3, namespace/name@alias or namespace/name@sha256:...",
    Reason.ALIAS_CONFLICT: "somebody moved it meanwhile; look at `adaptermesh alias history REF`",
    Reason.ALIAS_PROTECTED: "give --force to do it all the same",
    Reason.ALIAS_IN_USE: "`adaptermesh routes set` sends the requests elsewhere, `routes rm` ends them",
    Reason.ROUTE_CONFLICT: "somebody changed it meanwhile; look at `adaptermesh routes ls`",
    Reason.STATUS_CONFLICT: "somebody set it meanwhile; look at `adaptermesh adapters show REF`",
    Reason.VERSION_REVOKED: "use another version; `adaptermesh adapters show NAMESPACE/NAME` lists them",
    Reason.VERSION_UNSIGNED: "`adaptermesh adapters sign REF --key FILE` signs it",
    Reason.SIGNING_KEY_NOT_FOUND: "`adaptermesh signing-keys ls NAMESPACE` lists the keys, `add` adds one",
    Reason.FEED_POSITION_EXPIRED: "`adapters watch --from-snapshot` begins with all that is there",
    Reason.KEY_INVALID: "put a key into ADAPTERMESH_API_KEY; `adaptermesh keys create` makes one",
    Reason.PERMISSION_DENIED: "`adaptermesh whoami` shows what your key allows",
    Reason.QUOTA_EXCEEDED: "`adaptermesh tenants ls` shows what is used; operators change quotas",
    Reason.TENANT_NOT_FOUND: "`adaptermesh tenants set TENANT` makes one known",
    Reason.NAMESPACE_NOT_FOUND: "`adaptermesh namespaces ls` lists them",
    Reason.KEY_NOT_FOUND: "`adaptermesh keys ls` lists the keys",
    Reason.GRANT_NOT_FOUND: "`adaptermesh grants ls NAMESPACE` lists the grants",
    Reason.TENANT_CONFLICT: "somebody changed it meanwhile; look at `adaptermesh tenants ls`",
    Reason.NO_WORKER: "`adaptermesh status` lists the workers",
    Reason.STORE_UNREACHABLE: _START,
    Reason.ROUTER_UNREACHABLE: _START,
    Reason.DEADLINE_EXCEEDED: "`adaptermesh status` shows what is busy",
    Reason.INTERNAL: "the service's log has the cause",
}


def hint_for(error: MeshError) -> str:
    """What to do about an error; "" if nothing is known."""
    if "cause" in error.metadata:
        # The transport's word: no service answered.
        return _START if error.message.startswith("nothing answers") else "look at `adaptermesh status`"
    if error.reason is Reason.WORKER_LOST:
        return "send the request again; another worker takes it"
    return _HINTS.get(error.reason, "")


def print_failure(output: Output, message: str, hint: str = "", details: str = "") -> None:
    """`error: ...` on standard error, then the details and the hint."""
    console = output.errors
    console.print("error:", style="bold red", end=" ")
    console.print(message, soft_wrap=True)
    if details:
        console.print(f"  {details}", soft_wrap=True, style="dim")
    if hint:
        first, *rest = hint.splitlines()
        console.print(f"  hint: {first}", soft_wrap=True)
        for line in rest:
            console.print(f"  {line}", soft_wrap=True)


def print_mesh_error(output: Output, error: MeshError) -> None:
    """A refusal or failure of the mesh, with its reason and the request's id; as JSON too if wanted."""
    details = [f"reason: {error.reason.value} ({error.code.name})"]
    if request_id := error.metadata.get("request_id"):
        details.append(f"request: {request_id}")
    if error.retry_after is not None and error.code is not Code.UNAVAILABLE:
        details.append(f"retry after: {error.retry_after:g} s")
    print_failure(output, error.message, hint_for(error), "  ".join(details))
    if output.as_json:
        output.line({"error": error_document(error)})


def error_document(error: MeshError) -> dict[str, object]:
    """An error for programs."""
    return {
        "code": error.code.name,
        "reason": error.reason.value,
        "message": error.message,
        "metadata": error.metadata,
        "retry_after_seconds": error.retry_after,
    }
