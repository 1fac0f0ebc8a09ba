"""`adaptermesh adapters rm` and `history`: the end of a version, and what was ever said of it."""

import sys
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.commands.statuses import RefArgument
from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import CommandError, execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, short_digest, table
from adaptermesh.client import Version


def remove(
    ref: RefArgument,
    reason: Annotated[str, typer.Option(help="Why; whoever asks for the version reads it.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Removes a version for good. To only take it out of use, revoke it.

    Its number is never given again. What an alias points at, a route names or another version was made from
    can't be removed. `adapters gc` then frees the bytes that no other version needs.

    Example: adaptermesh adapters rm acme/ner:v1 --reason "uploaded by mistake"
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            version = (await client.resolve(ref, include_unusable=True)).version
            if not yes:
                _confirm(output, version)
            done = await client.delete_version(version, actor=actor, reason=reason)
        output.result(done, Text(f"{done.deleted.ref} is removed ({short_digest(done.deleted.digest)})"))

    execute(as_json, work)


def history(ref: RefArgument, store: StoreOption = "", as_json: JsonOption = False) -> None:
    """Lists every status that a version ever had, newest first: who set it, when and why.

    A version that was removed is found by its number.

    Example: adaptermesh adapters history acme/ner:v1
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            found = await client.status_history(ref)
        rows = table("change", "status", "when", "who", "why", "use instead", right=("change",))
        if found.deletion is not None:
            gone = found.deletion
            rows.add_row("", "removed", moment(gone.delete_time), gone.actor, gone.reason, "")
        for one in found.statuses:
            when = "" if one.update_time is None else moment(one.update_time)
            rows.add_row(str(one.generation), one.state, when, one.actor, one.reason, one.replacement)
        nothing = Text(f"nothing was ever said of {found.ref}: it is active")
        output.result(found, rows if rows.row_count else nothing)

    execute(as_json, work)


def _confirm(output: Output, version: Version) -> None:
    """Asks whoever sits at a terminal; a program has to say so itself."""
    if output.as_json or not at_terminal():
        raise CommandError(
            f"{version.ref} would be gone for good", "give --yes to remove it without being asked"
        )
    question = (
        f"Remove {version.ref} ({short_digest(version.digest)}, {version.description or 'no description'})?"
    )
    if not typer.confirm(question, err=True):
        raise CommandError(f"{version.ref} stays")


def at_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()
