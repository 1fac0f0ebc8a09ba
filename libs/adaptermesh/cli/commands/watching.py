"""`adaptermesh adapters watch`: what changes in a store, a line each."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, short_digest
from adaptermesh.client import (
    CHANGE_KINDS,
    Alias,
    ApiKey,
    BaseModel,
    Change,
    DeletedVersion,
    FeedPlace,
    Grant,
    MeshError,
    Namespace,
    NamespacePolicy,
    Route,
    StoreClient,
    Tenant,
    Version,
)
from adaptermesh.core.refs import AdapterName


def watch(
    adapter: Annotated[
        str, typer.Argument(metavar="[NAMESPACE[/NAME]]", help="Only what is of this namespace or adapter.")
    ] = "",
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help=f"Only these; give it several times. {', '.join(CHANGE_KINDS)}."),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option("--after", metavar="POSITION", min=0, help="Begin after it. Default: from now on."),
    ] = None,
    from_snapshot: Annotated[
        bool, typer.Option("--from-snapshot", help="First all that is there, then what changes.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="End where nothing more has changed yet.")] = False,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Prints each change of the store, with its position, until Ctrl-C; --json: one JSON object a line.

    A lost connection is opened again, and nothing is missed or told twice. `--after` goes on from where an
    earlier watch ended.

    Examples:
    adaptermesh adapters watch acme --kind version_published --kind version_deleted

    adaptermesh adapters watch --after 1041 --json
    """
    for kind in kinds or ():
        if kind not in CHANGE_KINDS:
            raise typer.BadParameter(f"'{kind}' is none of {', '.join(CHANGE_KINDS)}")
    if from_snapshot and after is not None:
        raise typer.BadParameter("--from-snapshot begins with all that is there, --after where you say")
    namespace, _, name = adapter.partition("/")
    if adapter:
        try:
            AdapterName.parse(adapter if name else f"{namespace}/x")
        except MeshError as error:
            raise typer.BadParameter(error.message) from error

    def wanted(change: Change) -> bool:
        if kinds and change.kind not in kinds:
            return False
        mine = _place(change.record)
        return (not namespace or mine[0] == namespace) and (not name or mine[1] == name)

    async def work(output: Output) -> None:
        async with (
            store_client(output, store) as client,
            aclosing(_changes(output, client, after, from_snapshot, once)) as changes,
        ):
            async for change in changes:
                if wanted(change):
                    _print(output, change)

    execute(as_json, work)


async def _changes(
    output: Output, client: StoreClient, after: int | None, from_snapshot: bool, once: bool
) -> AsyncGenerator[Change]:
    head = await client.feed_head()
    start = FeedPlace(head.feed_id, head.position if after is None else after)
    if from_snapshot:
        async with aclosing(client.snapshot()) as items:
            async for item in items:
                start = FeedPlace(head.feed_id, item.position)
                yield item

    def on_loss(error: MeshError) -> None:
        output.note(Text(f"{error.message}; trying again", style="yellow"))

    async with aclosing(client.changes(start, follow=not once, on_loss=on_loss)) as changes:
        async for change in changes:
            yield change


def _print(output: Output, change: Change) -> None:
    if output.as_json:
        output.line(change)
        return
    when = "" if change.time is None else moment(change.time)
    line = f"{change.position:>8}  {when:<19}  {change.kind:<21} {_about(change)}"
    output.console.print(Text(line), soft_wrap=True)


def _place(record: object) -> tuple[str | None, str | None]:
    """The namespace and the adapter that a change is about."""
    if isinstance(record, Namespace):
        return record.name, None
    return getattr(record, "namespace", None), getattr(record, "name", None)


def _about(change: Change) -> str:
    """What a change is about, in a few words."""
    match change.record:
        case Version() as version:
            return f"{version.ref} {_said(change.kind, version)}"
        case DeletedVersion() as gone:
            return gone.ref + _why(gone.actor, gone.reason)
        case Alias() as alias:
            where = "" if change.kind == "alias_deleted" else f" -> v{alias.version_number}"
            return f"{alias.ref}{where}{_why(alias.actor, alias.comment)}"
        case Route() as route:
            targets = ", ".join(target.ref for target in route.targets)
            return f"{route.tenant} {route.task}{f' -> {targets}' if targets else ''}"
        case BaseModel() as base:
            return f"{base.model_id} {short_digest(base.digest)}"
        case NamespacePolicy() as policy:
            return f"{policy.namespace}: signatures {policy.signatures}, {len(policy.keys)} keys"
        case Tenant() as tenant:
            return tenant.name
        case Namespace() as place:
            return f"{place.name} -> {place.tenant}"
        case Grant() as grant:
            return f"{grant.subject} to {grant.grantee}: {', '.join(grant.roles)}{_why(grant.actor, '')}"
        case ApiKey() as key:
            ended = "" if key.revoke_time is None else " revoked"
            return f"{key.key_id} of {key.tenant}{ended}{_why(key.actor, key.comment)}"
        case None:
            return "of a newer store"


def _said(kind: str, version: Version) -> str:
    match kind:
        case "version_status_set":
            return f"{version.status.state}{_why(version.status.actor, version.status.reason)}"
        case "version_signed":
            return f"by {', '.join(version.signing_key_ids)}"
        case _:
            return short_digest(version.digest)


def _why(actor: str, comment: str) -> str:
    by = f" by {actor}" if actor else ""
    return f"{by}: {comment}" if comment else by
