"""`adaptermesh audit`: what was changed, by whom."""

import datetime
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, table
from adaptermesh.client import AuditQuery

TimeOption = datetime.datetime | None


def audit(
    namespace: Annotated[str, typer.Option("--namespace", help="Only in this namespace.")] = "",
    subject: Annotated[
        str, typer.Option("--subject", metavar="PREFIX", help="Only what begins so, e.g. acme/ner.")
    ] = "",
    action: Annotated[str, typer.Option("--action", help="Only this one, e.g. version_published.")] = "",
    key_id: Annotated[str, typer.Option("--key", metavar="KEY_ID", help="Only with this API key.")] = "",
    since: Annotated[TimeOption, typer.Option("--since", help="Not earlier, in this machine's zone.")] = None,
    until: Annotated[TimeOption, typer.Option("--until", help="Earlier, in this machine's zone.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many.")] = 100,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Lists what was changed in the store, when, and by which key, newest first.

    Example: adaptermesh audit --subject acme/ner --since 2026-11-01
    """

    async def work(output: Output) -> None:
        query = AuditQuery(
            namespace=namespace,
            subject_prefix=subject,
            action=action,
            key_id=key_id,
            from_time=None if since is None else since.astimezone(),
            until_time=None if until is None else until.astimezone(),
        )
        async with store_client(output, store) as client:
            entries = await client.audit(query, limit=limit)
        rows = table("change", "when", "what", "of", "key", "tenant", "who", right=("change",))
        for entry in entries:
            rows.add_row(
                str(entry.feed_position),
                "" if entry.time is None else moment(entry.time),
                entry.action,
                entry.subject,
                entry.key_id,
                entry.key_tenant,
                entry.actor,
            )
        output.result(entries, rows if entries else Text("nothing was changed"))

    execute(as_json, work)
