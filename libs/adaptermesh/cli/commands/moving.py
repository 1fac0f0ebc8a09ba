"""`adaptermesh adapters copy|export|import`: versions on their way between stores, files and the hub."""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from adaptermesh.cli.connections import other_store_client, store_client
from adaptermesh.cli.execute import CommandError, execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption, TagsOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import size
from adaptermesh.cli.uploads import upload_report
from adaptermesh.client import AliasMove, Copied, Imported, Publication, StoreClient, UploadResult
from adaptermesh.core.refs import AdapterName

_ELSEWHERE = re.compile(r"store://([^/\s]+:\d{1,5})(?:/(.*))?")
_HUB = "hf://"
_WHAT_GOES_WITH_WHAT = "a folder and the hub need that, a file says it itself, another store brings it along"

AliasOption = Annotated[
    str, typer.Option("--alias", metavar="ALIAS", help="Then point this alias at it, e.g. prod.")
]
ParentsOption = Annotated[
    bool, typer.Option("--with-parents", help="Also copy what it was made from, under its own names.")
]
BaseOption = Annotated[
    bool, typer.Option("--with-base", help="Make its base model known there, if it isn't.")
]


@dataclass(frozen=True, slots=True)
class Place:
    """A ref or a name in a store; an empty address is the store that the command talks to."""

    address: str
    name: str

    @classmethod
    def parse(cls, text: str) -> "Place":
        """`NAME`, or `store://HOST:PORT/NAME`."""
        if not text.startswith("store://"):
            return cls("", text)
        match = _ELSEWHERE.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"'{text}' is no store: write store://HOST:PORT/NAMESPACE/NAME:v3")
        return cls(match[1], match[2] or "")


def copy(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A ref, here or as store://HOST:PORT/acme/ner:v3.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST", help="NAMESPACE/NAME, or store://HOST:PORT, or store://HOST:PORT/NAMESPACE/NAME."
        ),
    ],
    with_parents: ParentsOption = False,
    with_base: BaseOption = False,
    alias: AliasOption = "",
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Copies a version to another store, or to another name.

    Files, card, tags and licence are kept, and so is the digest under the same name, with the
    signatures of keys that are trusted there. Its number, status and aliases are not.

    Examples:
    adaptermesh adapters copy acme/ner@prod store://store.prod:7702

    adaptermesh adapters copy acme/ner:v3 shop/entities --alias prod
    """
    start, end = Place.parse(source), Place.parse(target)

    async def work(output: Output) -> None:
        async with _stores(output, start, end, store) as (here, there):
            await _copy(output, here, there, start.name, end.name, with_parents, with_base, alias, actor)

    execute(as_json, work)


def export(
    ref: Annotated[str, typer.Argument(metavar="REF", help="E.g. acme/ner:v2 or acme/ner@prod.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="Where it goes; must not exist.")],
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Writes a version to a tar file: its files, its manifest, what was said of it and its signatures.

    The same version gives the same bytes each time.

    Example: adaptermesh adapters export acme/ner:v2 ner-v2.tar
    """

    async def work(output: Output) -> None:
        from adaptermesh.client.moving import export_version

        async with store_client(output, store) as client:
            with output.transfer("exporting") as progress:
                done = await export_version(client, ref, file, progress=progress)
        output.result(done, Text(f"{done.version.ref} is in {done.path} ({size(done.size_bytes)})"))

    execute(as_json, work)


def import_version(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A file of `adapters export`, a folder, hf://ORG/NAME or hf://ORG/NAME@REVISION, or store://HOST:PORT/REF.",
        ),
    ],
    adapter: Annotated[
        str, typer.Argument(metavar="[NAMESPACE/NAME]", help="What to call it. Default: as it was called.")
    ] = "",
    base: Annotated[str, typer.Option(help="Of a folder or the hub: name or digest of its base.")] = "",
    task: Annotated[str, typer.Option(help="Of a folder or the hub: what it is for.")] = "",
    description: Annotated[str, typer.Option(help="Of a folder or the hub: a sentence about it.")] = "",
    tags: TagsOption = None,
    spdx: Annotated[str, typer.Option("--license", help="Of a folder or the hub: SPDX identifier.")] = "",
    author: Annotated[str, typer.Option(help="Of a folder or the hub: who made it.")] = "",
    with_parents: ParentsOption = False,
    with_base: BaseOption = False,
    alias: AliasOption = "",
    check: Annotated[bool, typer.Option("--check", help="Check everything, publish nothing.")] = False,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Publishes a version that comes from a file, a folder, the Hugging Face hub or another store.

    A file of `adapters export` becomes the very version that it was, or none. Of a repository of
    the hub only the adapter's own files are fetched, and no pickle.

    Examples:
    adaptermesh adapters import ner-v2.tar

    adaptermesh adapters import hf://org/ner-lora acme/ner --base smollm2-135m-instruct

    adaptermesh adapters import store://store.test:7702/acme/ner@prod
    """
    publication = Publication(base, task, description, tuple(tags or ()), spdx, author)
    place = Place.parse(source)
    hub = source.startswith(_HUB)
    file = not place.address and not hub and Path(source).is_file()
    if not (place.address or hub or file or Path(source).is_dir()):
        raise typer.BadParameter(f"'{source}' is no file or folder here, and neither hf:// nor store://")
    if check and (alias or place.address):
        raise typer.BadParameter(
            "--check publishes nothing: it goes with no alias, and not with another store"
        )

    async def work(output: Output) -> None:
        if place.address:
            _without(publication, source, {})
            async with _stores(output, place, Place("", ""), store) as (there, here):
                await _copy(output, there, here, place.name, adapter, with_parents, with_base, alias, actor)
            return
        _without(Publication(""), source, {"--with-parents": with_parents, "--with-base": with_base})
        async with store_client(output, store) as client:
            if file:
                _without(publication, source, {})
                await _from_file(output, client, Path(source), adapter, alias, actor, check)
                return
            await _from_folder(output, client, source, adapter, publication, alias, actor, check)

    execute(as_json, work)


@asynccontextmanager
async def _stores(
    output: Output, start: Place, end: Place, store: str
) -> AsyncIterator[tuple[StoreClient, StoreClient]]:
    """The store that a version comes from and the one it goes to; often the same."""
    async with _store(output, start, store) as source, _store(output, end, store) as target:
        yield source, target


def _store(output: Output, place: Place, store: str) -> StoreClient:
    own = store or output.settings.store
    return (
        store_client(output, own) if place.address in ("", own) else other_store_client(output, place.address)
    )


async def _copy(
    output: Output,
    source: StoreClient,
    target: StoreClient,
    ref: str,
    adapter: str,
    with_parents: bool,
    with_base: bool,
    alias: str,
    actor: str,
) -> None:
    from adaptermesh.client.moving import copy_version

    with output.transfer("copying") as progress:
        done = await copy_version(
            source,
            target,
            ref,
            adapter,
            with_parents=with_parents,
            with_base=with_base,
            actor=actor,
            progress=progress,
        )
    move = await _point(target, done.copy, alias, actor)
    lines = [Text(f"{one.source} came along as {one.version.ref}") for one in done.parents]
    output.result(_with_alias(done, move), *lines, *_report(done.copy, move))


async def _from_file(
    output: Output, client: StoreClient, file: Path, adapter: str, alias: str, actor: str, check: bool
) -> None:
    from adaptermesh.client.moving import import_archive

    with output.transfer("importing") as progress:
        done = await import_archive(
            client, file, adapter, actor=actor, validate_only=check, progress=progress
        )
    if check:
        text = f"{file}: every check passed, nothing was published ({done.version.digest})"
        output.result(done, Text(text, style="green"))
        return
    move = await _point(client, done, alias, actor)
    output.result(_with_alias(done, move), *_report(done, move))


async def _from_folder(
    output: Output,
    client: StoreClient,
    source: str,
    adapter: str,
    publication: Publication,
    alias: str,
    actor: str,
    check: bool,
) -> None:
    """A folder here, or what the hub has as one: nobody has said what it is."""
    if not adapter or not publication.base_model:
        raise CommandError(
            f"'{source}' does not say what it is", "give it a name, NAMESPACE/NAME, and --base its base model"
        )
    AdapterName.parse(adapter)
    with output.transfer("importing") as progress:
        if source.startswith(_HUB):
            from adaptermesh.client.moving import import_from_hub

            done = await import_from_hub(
                client, source, adapter, publication, validate_only=check, progress=progress
            )
        else:
            done = await client.upload(source, adapter, publication, validate_only=check, progress=progress)
    move = None if check else await _point(client, done, alias, actor)
    lines = upload_report(done, adapter, check=check)
    output.result(_with_alias(done, move), *lines, *_pointed(move))


async def _point(
    client: StoreClient, done: Imported | UploadResult, alias: str, actor: str
) -> AliasMove | None:
    if not alias:
        return None
    return await client.set_alias(f"{done.version.adapter}@{alias}", done.version.number, actor=actor)


def _with_alias(done: Copied | Imported | UploadResult, move: AliasMove | None) -> Any:
    """The result for programs: an alias is beside it if one was set."""
    return done if move is None else {"result": done, "alias": move.alias}


def _report(done: Imported, move: AliasMove | None) -> list[Text]:
    version = done.version
    if done.created:
        lines = [Text(f"{version.ref} published, from {done.source}", style="green")]
    else:
        lines = [Text(f"{version.ref} was there already: same content, same version")]
    before = "" if done.same_digest else f", for its other name; as {done.source} it has {done.source_digest}"
    lines.append(Text(f"  {version.digest}{before}"))
    if done.signed_by:
        lines.append(Text(f"  signatures that hold here, too: {', '.join(done.signed_by)}"))
    if done.signatures_left:
        lines.append(Text(f"  signatures left behind: {', '.join(done.signatures_left)}", style="yellow"))
    lines += [Text(f"  warning: {warning}", style="yellow") for warning in done.version.warnings]
    return lines + _pointed(move)


def _pointed(move: AliasMove | None) -> list[Text]:
    return [] if move is None else [Text(f"{move.alias.ref} -> v{move.alias.version_number}")]


def _without(publication: Publication, source: str, flags: Mapping[str, bool]) -> None:
    """Refuses what would be left out in silence."""
    given = [name for name, value in flags.items() if value]
    if publication != Publication(""):
        given.append("--base, --task and what else is said of an adapter")
    if given:
        raise CommandError(f"'{source}' is not imported with {', '.join(given)}", _WHAT_GOES_WITH_WHAT)
