"""`adaptermesh keys`: API keys for people and programs."""

import datetime
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import facts, moment, table
from adaptermesh.client import ApiKey, Role

app = typer.Typer(no_args_is_help=True, help="API keys: who may do what in the store and at the gateway.")

TenantOption = Annotated[
    str, typer.Option("--tenant", help="Whose they are, '*' for operators. Default: the caller's own tenant.")
]


@app.command()
def create(
    roles: Annotated[
        list[Role], typer.Option("--role", help="What it allows; give it several times for more.")
    ],
    tenant: TenantOption = "",
    namespaces: Annotated[
        list[str] | None,
        typer.Option("--namespace", help="It is good in this one only; give it several times for more."),
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0, max=3650, help="How long it is valid. Default: for good.")
    ] = None,
    comment: Annotated[str, typer.Option("--comment", "-m", help="What it is for.")] = "",
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Makes an API key and prints it, once: only a hash of it is kept.

    Commands read theirs from ADAPTERMESH_API_KEY.

    Example: adaptermesh keys create --tenant acme --role publisher -m "CI of the NER team"
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            made = await client.create_api_key(
                roles,
                tenant=tenant,
                namespaces=namespaces or (),
                ttl=None if days is None else datetime.timedelta(days=days),
                comment=comment,
                actor=actor,
            )
        key = made.key
        output.note(
            Text(f"{key.key_id} of {_whose(key)}: {', '.join(key.roles)}. Keep it: it is shown once.")
        )
        output.result(made, Text(made.secret))

    execute(as_json, work)


@app.command("ls")
def list_keys(tenant: TenantOption = "", store: StoreOption = "", as_json: JsonOption = False) -> None:
    """Lists the keys of a tenant without their secrets, newest first.

    Example: adaptermesh keys ls --tenant acme
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            keys = await client.list_api_keys(tenant)
        rows = table("key", "tenant", "roles", "only in", "made", "ends", "last used", "what for")
        for key in keys:
            rows.add_row(
                key.key_id,
                key.tenant,
                ", ".join(key.roles),
                ", ".join(key.namespaces),
                _when(key.create_time),
                _end(key),
                _when(key.last_use_time),
                key.comment,
            )
        output.result(keys, rows if keys else Text("no keys"))

    execute(as_json, work)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As `keys ls` shows it.")],
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Ends a key for good.

    Example: adaptermesh keys revoke amk_abcdefgh
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.revoke_api_key(key_id, actor=actor)
        before = "" if change.feed_position else " (it was before)"
        output.result(change, Text(f"{change.key.key_id} of {_whose(change.key)} is revoked{before}"))

    execute(as_json, work)


def whoami(store: StoreOption = "", as_json: JsonOption = False) -> None:
    """Shows whom the key in ADAPTERMESH_API_KEY stands for, and what it allows.

    Example: adaptermesh whoami
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            caller = await client.caller()
        output.result(
            caller,
            facts(
                key=caller.key_id or "none is asked for",
                tenant="the whole mesh" if caller.tenant == "*" else caller.tenant,
                roles=", ".join(caller.roles),
                only_in=", ".join(caller.namespaces),
                ends=_when(caller.expire_time),
            ),
        )

    execute(as_json, work)


def _whose(key: ApiKey) -> str:
    return "the mesh's operators" if key.tenant == "*" else f"tenant {key.tenant}"


def _when(time: datetime.datetime | None) -> str:
    return "" if time is None else moment(time)


def _end(key: ApiKey) -> str:
    if key.revoke_time is not None:
        return f"revoked {moment(key.revoke_time)}"
    return _when(key.expire_time)
