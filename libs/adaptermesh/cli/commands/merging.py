"""`adaptermesh adapters merge`: several stored versions become one new one."""

import math
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.artifact.merging_recipe import MergeMethod
from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption, TagsOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.uploads import upload_report
from adaptermesh.client import Merge, MergeResult, Publication, UploadResult


def merge(
    adapter: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="What to call the result.")],
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="REF[=WEIGHT]...", help="E.g. acme/ner:v2=0.7. Without a weight it is 1; 0 leaves it out."
        ),
    ],
    method: Annotated[
        MergeMethod,
        typer.Option(help="A weighted sum, an average, a sum cut to a rank, TIES or DARE."),
    ] = MergeMethod.LINEAR,
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of the result at each module, for svd, ties and dare.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of each delta's entries to keep, over 0 and up to 1, for ties and dare."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides which entries dare drops. Default: 0.", min=0)
    ] = None,
    task: Annotated[str, typer.Option(help="What it is for. Default: the members', if they agree.")] = "",
    description: Annotated[str, typer.Option(help="A sentence about it.")] = "",
    tags: TagsOption = None,
    spdx: Annotated[
        str, typer.Option("--license", help="SPDX identifier. Default: the members', if they agree.")
    ] = "",
    author: Annotated[str, typer.Option(help="Who made it.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Merge and check, publish nothing.")] = False,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Merges versions that were trained on one base into the next version of an adapter.

    The members' tensors are fetched, merged on this machine and uploaded as a plain LoRA, with the members as
    its parents and the recipe in its manifest. Low-rank adapters only: no DoRA, no IA3, no bias.

    linear and average are exact, and their ranks add up; svd, ties and dare end at --rank, and the share of
    the change that this leaves is printed.

    Examples:
    adaptermesh adapters merge acme/both acme/ner:v2=0.7 acme/sql@prod=0.3

    adaptermesh adapters merge acme/both acme/ner:v2 acme/sql:v1 --method ties --density 0.3 --rank 16
    """
    plan = Merge(tuple(_member(text) for text in members), method.value, rank, density, seed)
    publication = Publication("", task, description, tuple(tags or ()), spdx, author)

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            with output.steps() as show:
                result = await client.merge(
                    adapter,
                    plan,
                    publication,
                    validate_only=check,
                    progress=lambda moved: show(f"moving {moved.path}", moved.done_bytes, moved.total_bytes),
                    on_module=lambda done, of: show("merging modules", done, of),
                )
        output.result(result, *_report(result, adapter, check=check))

    execute(as_json, work)


def _member(text: str) -> tuple[str, float]:
    """`REF` or `REF=WEIGHT`."""
    ref, equals, weight = text.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not ref or not math.isfinite(value):
        raise typer.BadParameter(
            f"'{text}' is not REF or REF=WEIGHT with a number, e.g. acme/ner:v2=0.7", param_hint="members"
        )
    return ref, value


def _report(result: MergeResult, adapter: str, *, check: bool) -> list[Text]:
    head, *rest = upload_report(
        UploadResult(result.version, result.created, result.feed_position), adapter, check=check
    )
    numbers = {"density": result.density, "seed": result.seed}
    given = "".join(f", {name} {value:g}" for name, value in numbers.items() if value is not None)
    lines = [head, Text(f"  {result.method}{given}, {result.modules} modules, rank {result.max_rank}, of")]
    lines += [Text(f"  {member.weight:>8g}  {member.ref}  {member.digest}") for member in result.members]
    if result.rank is not None:
        lines.append(
            Text(
                f"  cutting to rank {result.rank} kept {_percent(result.kept)} of the squared norm, "
                f"{_percent(result.least_kept)} at {result.least_kept_module}"
            )
        )
    return lines + rest


def _percent(share: float) -> str:
    """Never 100 % of what was cut."""
    return f"{math.floor(share * 1000) / 10:g} %" if share < 1 else "100 %"
