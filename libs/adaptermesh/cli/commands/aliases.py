"""`adaptermesh alias set|protect|unprotect|rm|history` and `adaptermesh rollback`."""

from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, short_digest, table
from adaptermesh.client import AliasMove

app = typer.Typer(no_args_is_help=True, help="Point aliases at versions, and see where they pointed.")

AliasArgument = Annotated[str, typer.Argument(metavar="REF@ALIAS", help="E.g. acme/ner@prod.")]
GenerationOption = Annotated[
    int | None,
    typer.Option(
        "--expect",
        metavar="GENERATION",
        min=0,
        help="Move it only if this is its generation now; 0: only if it does not exist yet.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it although the alias is protected.")]
CommentOption = Annotated[str, typer.Option("--comment", "-m", help="Why, for the history.")]


@app.command("set")
def set_alias(
    alias: AliasArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="v2, or a ref of the same adapter.")],
    expect: GenerationOption = None,
    force: ForceOption = False,
    actor: ActorOption = "",
    comment: CommentOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Points an alias at a version.

    Requests that were resolved before finish on the version they have; later ones get the new one.

    Example: adaptermesh alias set acme/ner@prod v2 --comment "better dates"
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            move = await client.set_alias(
                alias,
                version,
                expected_generation=expect,
                actor=actor,
                comment=comment,
                acknowledge_protection=force,
            )
        output.result(move, _moved(move))

    execute(as_json, work)


@app.command()
def protect(
    alias: AliasArgument,
    expect: GenerationOption = None,
    actor: ActorOption = "",
    comment: CommentOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Protects an alias: it moves, and is removed, only with --force.

    Example: adaptermesh alias protect acme/ner@prod
    """
    _set_protection(alias, True, expect, actor, comment, store, as_json)


@app.command()
def unprotect(
    alias: AliasArgument,
    expect: GenerationOption = None,
    actor: ActorOption = "",
    comment: CommentOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Takes the protection of an alias away.

    Example: adaptermesh alias unprotect acme/ner@prod
    """
    _set_protection(alias, False, expect, actor, comment, store, as_json)


@app.command("rm")
def remove(
    alias: AliasArgument,
    expect: GenerationOption = None,
    force: ForceOption = False,
    actor: ActorOption = "",
    comment: CommentOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Removes an alias that no route uses. Its history stays, and goes on if it is set again.

    Example: adaptermesh alias rm acme/ner@canary
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            gone = await client.delete_alias(
                alias,
                expected_generation=expect,
                actor=actor,
                comment=comment,
                acknowledge_protection=force,
            )
        output.result(gone, Text(f"{gone.alias.ref} removed; it pointed to v{gone.alias.version_number}"))

    execute(as_json, work)


@app.command()
def history(alias: AliasArgument, store: StoreOption = "", as_json: JsonOption = False) -> None:
    """Lists every change of an alias, newest first, also of one that is removed.

    Example: adaptermesh alias history acme/ner@prod
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            moves = await client.alias_history(alias)
        rows = table("move", "what", "version", "digest", "when", "who", "why", right=("move",))
        for move in moves:
            rows.add_row(
                str(move.generation),
                move.action,
                f"v{move.version_number}",
                short_digest(move.digest),
                moment(move.update_time),
                move.actor,
                move.comment,
            )
        output.result({"moves": moves}, rows)

    execute(as_json, work)


def roll_back(
    alias: AliasArgument,
    expect: GenerationOption = None,
    force: ForceOption = False,
    actor: ActorOption = "",
    comment: CommentOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Points an alias at the version it pointed to before its last move.

    Example: adaptermesh rollback acme/ner@prod
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            move = await client.roll_back(
                alias,
                expected_generation=expect,
                actor=actor,
                comment=comment,
                acknowledge_protection=force,
            )
        output.result(move, _moved(move))

    execute(as_json, work)


def _moved(move: AliasMove) -> Text:
    alias = move.alias
    return Text(
        f"{alias.ref} -> v{alias.version_number} ({short_digest(alias.digest)}), move {alias.generation}"
    )


def _set_protection(
    alias: str,
    protected: bool,
    expect: int | None,
    actor: str,
    comment: str,
    store: str,
    as_json: bool,
) -> None:
    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.protect_alias(
                alias, protected=protected, expected_generation=expect, actor=actor, comment=comment
            )
        output.result(change, Text(f"{change.alias.ref} is {change.alias.action}"))

    execute(as_json, work)
