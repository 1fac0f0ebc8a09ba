"""`adaptermesh adapters search`: by words and by what an adapter is."""

from collections.abc import Sequence
from typing import Annotated, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption, TagsOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import size, table
from adaptermesh.cli.version_report import state_note
from adaptermesh.client import Adapter, Found, Search

_SHOWN_VALUES = 5


def search(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Each must begin a word of the name, tags, description or card. None finds all."),
    ] = None,
    task: Annotated[str, typer.Option(help="Exact task of the newest version.")] = "",
    base: Annotated[str, typer.Option(help="Name or digest of the base model.")] = "",
    kind: Annotated[str, typer.Option(help="Exact kind, e.g. lora or ia3.")] = "",
    spdx: Annotated[str, typer.Option("--license", help="Exact licence, e.g. apache-2.0.")] = "",
    tags: TagsOption = None,
    namespace: Annotated[str, typer.Option(help="Exact namespace.")] = "",
    language: Annotated[str, typer.Option(help="Exact language, as the card names it, e.g. en.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose the namespace is.")] = "",
    sort: Annotated[
        Literal["relevance", "date", "newest", "name", "downloads", "score"] | None,
        typer.Option(help="The order; newest is date. Default: relevance with words, else date."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="For --sort score: metric or task/metric of the card. Default: accuracy.")
    ] = "",
    lowest: Annotated[
        bool, typer.Option("--lowest-first", help="For --sort score: the lowest first, as for a loss.")
    ] = False,
    facets: Annotated[bool, typer.Option("--facets", help="Count what they have in common, too.")] = False,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=100_000)] = 100,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Finds adapters by words, task, base, kind, licence, language, tenant and tags; all given must hold.

    Example: adaptermesh adapters search invoice entities --task financial-ner --tag finance --facets
    """
    query = Search(
        text=" ".join(words or ()),
        namespace=namespace,
        base_model=base,
        task=task,
        kind=kind,
        license=spdx,
        tags=tuple(tags or ()),
        order=sort or "",
        with_facets=facets,
        language=language,
        tenant=tenant,
        score_metric=metric,
        lowest_score_first=lowest,
    )

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            found = await client.search(query, limit=limit)
        output.result(found, *_report(found))

    execute(as_json, work)


def adapters_table(adapters: Sequence[Adapter]) -> RenderableType:
    """A line for each: its newest version and its aliases."""
    rows = table(
        *("adapter", "newest", "task", "base", "kind", "rank", "size", "downloads", "aliases"),
        right=("rank", "size", "downloads"),
    )
    for adapter in adapters:
        newest = adapter.newest
        aliases = ", ".join(
            f"{alias.alias}=v{alias.version_number}"
            + (" (unusable)" if alias.version_number in adapter.unusable_numbers else "")
            for alias in adapter.aliases
        )
        rows.add_row(
            adapter.name,
            f"v{newest.number}{state_note(newest)}",
            newest.task,
            newest.base_model_id,
            newest.kind,
            str(newest.max_rank or ""),
            size(newest.size_bytes),
            str(adapter.download_count),
            aliases,
        )
    return rows if adapters else Text("no adapters")


def _report(found: Found) -> list[RenderableType]:
    parts = [adapters_table(found.adapters)]
    if found.more:
        parts.append(Text("there are more: give more words or conditions, or a higher --limit"))
    if found.facets:
        rows = table("of all that match", "how many have which")
        for field, values in found.facets.items():
            shown = ", ".join(f"{value or 'none'} {count}" for value, count in values[:_SHOWN_VALUES])
            rows.add_row(field, shown + (", ..." if len(values) > _SHOWN_VALUES else ""))
        parts.append(rows)
    return parts
