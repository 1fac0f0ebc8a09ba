"""`adaptermesh adapters upload`."""

from pathlib import Path
from typing import Annotated

import typer

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import CommandError, execute
from adaptermesh.cli.local_bases import cached_base
from adaptermesh.cli.options import HomeOption, JsonOption, StoreOption, TagsOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.uploads import dry_run_report, upload_report
from adaptermesh.client import MeshError, Publication, Reason


def upload(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that peft or adapters saved.")],
    adapter: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="What to call it.")],
    base: Annotated[str, typer.Option(help="Name or digest of the base model it was trained on.")],
    task: Annotated[str, typer.Option(help="What it is for, e.g. financial-ner.")] = "",
    description: Annotated[str, typer.Option(help="A sentence about it.")] = "",
    tags: TagsOption = None,
    spdx: Annotated[str, typer.Option("--license", help="SPDX identifier, e.g. apache-2.0.")] = "",
    author: Annotated[str, typer.Option(help="Who made it.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Send it and have the store check everything, publish nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything here, send nothing; needs no store.")
    ] = False,
    in_parts: Annotated[
        bool | None,
        typer.Option("--in-parts/--in-one-piece", help="How to send it. Default: in parts from 32 MiB on."),
    ] = None,
    home: HomeOption = None,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Uploads a folder that peft or the adapters library saved as the next version of an adapter.

    The same content under the same name is the same version: uploading it again changes nothing.

    What is sent in parts goes on after an interruption: give the same command again.

    A dry run needs the base model in this machine's cache (`adaptermesh models pull`), or else a store that
    knows it.

    Example: adaptermesh adapters upload ./out acme/ner --base smollm2-135m-instruct --task financial-ner
    --license apache-2.0
    """
    if check and dry_run:
        raise typer.BadParameter("--check asks the store, --dry-run does not: give one of them")
    publication = Publication(base, task, description, tuple(tags or ()), spdx, author)

    async def send(output: Output) -> None:
        place = home or output.settings.home
        async with store_client(output, store) as client:
            with output.transfer("uploading") as progress:
                result = await client.upload(
                    folder,
                    adapter,
                    publication,
                    validate_only=check,
                    in_parts=in_parts,
                    remember_in=place / "uploads",
                    progress=progress,
                )
        output.result(result, *upload_report(result, adapter, check=check))

    async def try_out(output: Output) -> None:
        # Only here: it needs numpy, and other commands start faster without it.
        from adaptermesh.client import dry_run as trial

        place = home or output.settings.home
        facts = cached_base(place, base) or await _stored_base(output, store, base)
        result = await trial.dry_run(folder, adapter, publication, facts)
        output.result(result, *dry_run_report(result))

    execute(as_json, try_out if dry_run else send)


async def _stored_base(output: Output, store: str, base: str) -> BaseFacts:
    """What the store knows of the base; raises CommandError if it knows nothing, or does not answer."""
    message = f"base model '{base}' is not in this machine's cache"
    hint = f"fetch it with `adaptermesh models pull {base}`, or name a store that knows it"
    async with store_client(output, store) as client:
        try:
            known = await client.list_base_models()
            found = [one.digest for one in known if base in (one.model_id, one.digest)]
            if len(found) == 1:
                return await client.base_facts(found[0])
        except MeshError as error:
            if error.reason is not Reason.STORE_UNREACHABLE:
                raise
            raise CommandError(f"{message}, and no store answers at {store}", hint) from error
    if found:
        raise CommandError(f"the store knows {len(found)} base models named '{base}'", "give the digest")
    raise CommandError(f"{message}, nor does the store at {store} know it", hint)
