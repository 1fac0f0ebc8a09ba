"""`adaptermesh tenants` and `adaptermesh namespaces`: who has what, and how much of it."""

from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import size, table
from adaptermesh.client import Tenant

app = typer.Typer(no_args_is_help=True, help="Tenants: whom namespaces and keys belong to, and their quotas.")
namespaces_app = typer.Typer(no_args_is_help=True, help="Namespaces: whose they are, and what they hold.")

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="E.g. acme-corp.")]


@app.command("set")
def set_tenant(
    tenant: TenantArgument,
    max_bytes: Annotated[int, typer.Option(min=0, help="Most bytes of all its versions. 0: no bound.")] = 0,
    max_versions: Annotated[int, typer.Option(min=0, help="Most versions. 0: no bound.")] = 0,
    max_requests: Annotated[
        int, typer.Option(min=0, help="Most calls a minute, at each store and gateway. 0: no bound.")
    ] = 0,
    expect: Annotated[
        int | None,
        typer.Option("--expect", metavar="GENERATION", min=0, help="Set it only if it is at this one."),
    ] = None,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Makes a tenant known, or replaces its quotas.

    Example: adaptermesh tenants set acme-corp --max-versions 1000 --max-requests 600
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.set_tenant(
                tenant,
                max_bytes=max_bytes,
                max_versions=max_versions,
                max_requests_per_minute=max_requests,
                expected_generation=expect,
                actor=actor,
            )
        output.result(change, Text(f"tenant {tenant}: {_quotas(change.tenant)}"))

    execute(as_json, work)


@app.command("ls")
def list_tenants(store: StoreOption = "", as_json: JsonOption = False) -> None:
    """Lists tenants with what they use and what they may use.

    Example: adaptermesh tenants ls
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            tenants = await client.list_tenants()
        rows = table("tenant", "versions", "bytes", "quotas", right=("versions", "bytes"))
        for tenant in tenants:
            usage = tenant.usage
            used = ("", "") if usage is None else (str(usage.versions), size(usage.bytes))
            rows.add_row(tenant.name, *used, _quotas(tenant))
        output.result(tenants, rows)

    execute(as_json, work)


@namespaces_app.command("set")
def set_namespace(
    namespace: Annotated[str, typer.Argument(metavar="NAMESPACE", help="E.g. acme.")],
    tenant: TenantArgument,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Gives a namespace to a tenant. Without this, whoever uploads first into a new one has it.

    Example: adaptermesh namespaces set acme acme-corp
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.set_namespace(namespace, tenant, actor=actor)
        output.result(change, Text(f"namespace {namespace} belongs to tenant {tenant}"))

    execute(as_json, work)


@namespaces_app.command("ls")
def list_namespaces(
    tenant: Annotated[str, typer.Option("--tenant", help="Only those of this tenant.")] = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Lists namespaces with what they hold.

    Example: adaptermesh namespaces ls --tenant acme-corp
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            found = await client.list_namespaces(tenant)
        rows = table("namespace", "tenant", "versions", "bytes", right=("versions", "bytes"))
        for namespace in found:
            usage = namespace.usage
            used = ("", "") if usage is None else (str(usage.versions), size(usage.bytes))
            rows.add_row(namespace.name, namespace.tenant, *used)
        output.result(found, rows if found else Text("no namespaces"))

    execute(as_json, work)


def _quotas(tenant: Tenant) -> str:
    bounds = (
        (tenant.max_versions, f"{tenant.max_versions} versions"),
        (tenant.max_bytes, size(tenant.max_bytes)),
        (tenant.max_requests_per_minute, f"{tenant.max_requests_per_minute} requests a minute"),
    )
    return ", ".join(text for bound, text in bounds if bound) or "no bounds"
