"""`adaptermesh grants`: what other tenants, or everybody, may do in a namespace."""

from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import CommandError, execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, table
from adaptermesh.client import Role

app = typer.Typer(
    no_args_is_help=True, help="Grants: what other tenants, or everybody, may do in a namespace."
)

WhereArgument = Annotated[
    str, typer.Argument(metavar="NAMESPACE[/NAME]", help="All of a namespace, or one adapter of it.")
]
GranteeArgument = Annotated[str, typer.Argument(metavar="TENANT", help="To whom; '*' for everybody.")]


@app.command("set")
def set_grant(
    where: WhereArgument,
    grantee: GranteeArgument,
    roles: Annotated[
        list[Role], typer.Option("--role", help="What is allowed; give it several times for more.")
    ],
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Allows a tenant something; a key of it needs the role, too. Replaces what was granted before.

    Example: adaptermesh grants set acme/ner other-corp --role reader
    """

    async def work(output: Output) -> None:
        namespace, name = _place(where)
        async with store_client(output, store) as client:
            change = await client.set_grant(namespace, grantee, roles, name=name, actor=actor)
        grant = change.grant
        allowed = ", ".join(grant.roles)
        output.result(change, Text(f"{_who(grant.grantee)} may act as {allowed} in {grant.subject}"))

    execute(as_json, work)


@app.command("rm")
def remove(
    where: WhereArgument,
    grantee: GranteeArgument,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Takes a grant back.

    Example: adaptermesh grants rm acme/ner other-corp
    """

    async def work(output: Output) -> None:
        namespace, name = _place(where)
        async with store_client(output, store) as client:
            position = await client.delete_grant(namespace, grantee, name=name, actor=actor)
        gone = {"namespace": namespace, "name": name, "grantee": grantee, "feed_position": position}
        output.result(gone, Text(f"{_who(grantee)} is granted nothing more in {namespace}/{name or '*'}"))

    execute(as_json, work)


@app.command("ls")
def list_grants(
    namespace: Annotated[str, typer.Argument(metavar="[NAMESPACE]", help="Those of this namespace.")] = "",
    to: Annotated[str, typer.Option("--to", metavar="TENANT", help="Those to a tenant, or to '*'.")] = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Lists the grants of a namespace, or those to a tenant.

    Example: adaptermesh grants ls acme
    """

    async def work(output: Output) -> None:
        if bool(namespace) == bool(to):
            raise CommandError("name a namespace, or give --to", "e.g. `adaptermesh grants ls acme`")
        async with store_client(output, store) as client:
            grants = await client.list_grants(namespace=namespace, grantee=to)
        rows = table("what", "to", "roles", "since", "by")
        for grant in grants:
            since = "" if grant.update_time is None else moment(grant.update_time)
            rows.add_row(grant.subject, grant.grantee, ", ".join(grant.roles), since, grant.actor)
        output.result(grants, rows if grants else Text("no grants"))

    execute(as_json, work)


def _place(where: str) -> tuple[str, str]:
    namespace, _, name = where.partition("/")
    return namespace, "" if name == "*" else name


def _who(grantee: str) -> str:
    return "everybody" if grantee == "*" else f"tenant {grantee}"
