"""`adaptermesh adapters`: upload, download, search, ls, show; what is beside them has files of its own."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.commands.comparing import diff
from adaptermesh.cli.commands.merging import merge
from adaptermesh.cli.commands.moving import copy, export, import_version
from adaptermesh.cli.commands.removing import history, remove
from adaptermesh.cli.commands.searching import adapters_table, search
from adaptermesh.cli.commands.signing_keys import sign
from adaptermesh.cli.commands.statuses import deprecate, restore, revoke
from adaptermesh.cli.commands.stored_bytes import collect_garbage, verify
from adaptermesh.cli.commands.uploading import upload
from adaptermesh.cli.commands.watching import watch
from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, short_digest, size, table
from adaptermesh.cli.version_report import version_details, version_report
from adaptermesh.client import Version
from adaptermesh.core.refs import AdapterName

app = typer.Typer(no_args_is_help=True, help="Upload, find, fetch and merge adapters.")


app.command()(upload)


@app.command()
def download(
    ref: Annotated[str, typer.Argument(metavar="REF", help="E.g. acme/ner:v2 or acme/ner@prod.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that differ.")] = False,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Fetches the files of a version, byte for byte as they were uploaded.

    An interrupted download is continued where it stopped. Every file is checked against its sha256.

    Example: adaptermesh adapters download acme/ner@prod ./ner
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            with output.transfer("fetching") as progress:
                version = await client.download(ref, folder, force=force, progress=progress)
        total = sum(file.size_bytes for file in version.source_files)
        text = f"{version.ref}: {len(version.source_files)} files, {size(total)}, verified, in {folder}"
        output.result({"folder": folder, "version": version}, Text(text))

    execute(as_json, work)


app.command()(search)


@app.command("ls")
def list_adapters(
    namespace: Annotated[str, typer.Option(help="Exact namespace.")] = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Lists all adapters, with their newest version and their aliases.

    Example: adaptermesh adapters ls
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            adapters = await client.list_adapters(namespace=namespace)
        output.result({"adapters": adapters}, adapters_table(adapters))

    execute(as_json, work)


@app.command()
def show(
    ref: Annotated[str, typer.Argument(metavar="REF", help="An adapter, or any ref of one version.")],
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Shows the versions of an adapter, or everything about one version.

    That is status, card, lineage, metrics, signatures and files.

    Examples:
    adaptermesh adapters show acme/ner

    adaptermesh adapters show acme/ner@prod
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            if "@" in ref or ":" in ref:
                details = await version_details(client, ref)
                output.result(details, *version_report(details, pretty=output.console.is_terminal))
                return
            name = AdapterName.parse(ref)
            versions = await client.list_versions(ref)
            summaries = await client.list_adapters(ref, namespace=name.namespace)
            downloads = await client.download_counts([version.digest for version in versions])
        adapter = next((summary for summary in summaries if summary.name == ref), None)
        pointers = adapter.aliases if adapter is not None else ()
        _print_versions(
            output, versions, {alias.alias: alias.version_number for alias in pointers}, downloads
        )

    execute(as_json, work)


app.command()(merge)
app.command()(diff)
app.command()(sign)
app.command()(deprecate)
app.command()(revoke)
app.command()(restore)
app.command("rm")(remove)
app.command()(history)
app.command()(copy)
app.command()(export)
app.command("import")(import_version)
app.command()(watch)
app.command()(verify)
app.command("gc")(collect_garbage)


def _print_versions(
    output: Output, versions: list[Version], pointers: dict[str, int], downloads: list[int]
) -> None:
    rows = table(
        "version",
        "status",
        "digest",
        "published",
        "kind",
        "rank",
        "size",
        "downloads",
        "aliases",
        "description",
        right=("rank", "size", "downloads"),
    )
    for version, count in zip(versions, downloads, strict=True):
        rows.add_row(
            version.ref,
            version.status.state,
            short_digest(version.digest),
            moment(version.create_time),
            version.kind,
            str(version.max_rank or ""),
            size(version.size_bytes),
            str(count),
            ", ".join(alias for alias, number in pointers.items() if number == version.number),
            version.description,
        )
    nothing = Text("no versions: all of them were removed")
    output.result(
        {"versions": versions, "aliases": pointers, "download_counts": downloads},
        rows if versions else nothing,
    )
