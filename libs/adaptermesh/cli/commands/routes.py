"""`adaptermesh routes`: set, rm, ls."""

from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, table
from adaptermesh.client import Route, RouteTarget

app = typer.Typer(no_args_is_help=True, help="Say which adapter serves which task.")

TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="E.g. financial-ner.")]
TenantOption = Annotated[
    str, typer.Option(help="A tenant, or '*' for every tenant that has no rule of its own for the task.")
]


@app.command("set")
def set_route(
    task: TaskArgument,
    targets: Annotated[
        list[str],
        typer.Argument(metavar="REF[=WEIGHT]...", help="Where requests go; several share by their weights."),
    ],
    tenant: TenantOption = "*",
    expect: Annotated[
        int | None,
        typer.Option(
            "--expect",
            metavar="GENERATION",
            min=0,
            help="Change it only if this is its generation now; 0: only if it does not exist yet.",
        ),
    ] = None,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Sends the requests for a task to an adapter, or to several by weight.

    A caller with a cohort key (x-cohort-key) always gets the same share.

    Examples:
    adaptermesh routes set financial-ner acme/ner@prod --tenant '*'

    adaptermesh routes set financial-ner acme/ner@prod=95 acme/ner@canary=5 --tenant acme
    """
    chosen = [_target(target) for target in targets]

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.set_route(task, chosen, tenant=tenant, expected_generation=expect)
        route = change.route
        text = f"{route.tenant}  {route.task} -> {_shares(route)}, change {route.generation}"
        output.result(change, Text(text))

    execute(as_json, work)


@app.command("rm")
def remove(
    task: TaskArgument, tenant: TenantOption = "*", store: StoreOption = "", as_json: JsonOption = False
) -> None:
    """Removes a route.

    Example: adaptermesh routes rm financial-ner --tenant acme
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            position = await client.delete_route(task, tenant=tenant)
        removed = {"tenant": tenant, "task": task, "feed_position": position}
        output.result(removed, Text(f"{tenant}  {task}: route removed"))

    execute(as_json, work)


@app.command("ls")
def list_routes(
    tenant: Annotated[str, typer.Option(help="Only this tenant's ('*' for those of every tenant).")] = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Lists the routes.

    Example: adaptermesh routes ls
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            routes = await client.list_routes(tenant=tenant)
        rows = table("tenant", "task", "goes to", "changes", "last change", right=("changes",))
        for route in routes:
            rows.add_row(
                route.tenant, route.task, _shares(route), str(route.generation), moment(route.update_time)
            )
        output.result({"routes": routes}, rows if routes else Text("no routes"))

    execute(as_json, work)


def _target(text: str) -> RouteTarget:
    """`REF` or `REF=WEIGHT`."""
    ref, equals, weight = text.rpartition("=")
    if not equals:
        return RouteTarget(text)
    if not weight.isdecimal() or not ref:
        raise typer.BadParameter(f"'{text}' is neither a ref nor REF=WEIGHT with a whole number")
    return RouteTarget(ref, int(weight))


def _shares(route: Route) -> str:
    """The targets, with their shares if there are several."""
    total = sum(target.weight for target in route.targets)
    if len(route.targets) == 1 or total == 0:
        return ", ".join(target.ref for target in route.targets)
    return ", ".join(f"{target.ref} {100 * target.weight / total:.4g}%" for target in route.targets)
