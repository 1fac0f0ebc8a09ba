"""`adaptermesh adapters deprecate|revoke|restore`: whether a version should be used."""

from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.client import VersionState

RefArgument = Annotated[str, typer.Argument(metavar="REF", help="E.g. acme/ner:v2 or acme/ner@prod.")]
ExpectOption = Annotated[
    int | None,
    typer.Option(
        "--expect",
        metavar="GENERATION",
        min=0,
        help="Set it only if this is the status' generation now; 0: only if it was never set.",
    ),
]


def deprecate(
    ref: RefArgument,
    replacement: Annotated[str, typer.Option(metavar="REF", help="What to use instead; it must exist.")] = "",
    reason: Annotated[str, typer.Option(help="Why, for whoever still uses it.")] = "",
    expect: ExpectOption = None,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Marks a version as one that should no longer be used. It is served, with a warning.

    Example: adaptermesh adapters deprecate acme/ner:v1 --replacement acme/ner:v2 --reason "old dates"
    """
    _set(ref, VersionState.DEPRECATED, reason, replacement, expect, actor, store, as_json)


def revoke(
    ref: RefArgument,
    reason: Annotated[str, typer.Option(help="Why; whoever asks for the version reads it.")],
    expect: ExpectOption = None,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Takes a version out of use: whatever means it is refused from now on, with the reason.

    Requests that run finish. Aliases and routes that point at it stay and are refused: move them.

    Example: adaptermesh adapters revoke acme/ner:v1 --reason "trained on data we may not use"
    """
    _set(ref, VersionState.REVOKED, reason, "", expect, actor, store, as_json)


def restore(
    ref: RefArgument,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    expect: ExpectOption = None,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Makes a deprecated or revoked version one like any other again.

    Example: adaptermesh adapters restore acme/ner:v1
    """
    _set(ref, VersionState.ACTIVE, reason, "", expect, actor, store, as_json)


def _set(
    ref: str,
    state: VersionState,
    reason: str,
    replacement: str,
    expect: int | None,
    actor: str,
    store: str,
    as_json: bool,
) -> None:
    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.set_status(
                ref,
                state,
                reason=reason,
                replacement=replacement,
                expected_generation=expect,
                actor=actor,
            )
        output.result(change, Text(f"{change.version.ref} is {change.version.status.state}"))

    execute(as_json, work)
