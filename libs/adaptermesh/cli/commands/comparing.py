"""`adaptermesh adapters diff`: two versions side by side."""

import json
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import table
from adaptermesh.client import VersionDifference

_Row = tuple[str, ...]
_ROWS = 20
"""Of each table; --json has all."""


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A ref, e.g. acme/ner:v1.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The ref to compare it with.")],
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Compares two versions: what is said of them, where and how they act, metrics, and their weights.

    The relative change of a module is ||B - A|| / ||A|| over its tensors.

    Example: adaptermesh adapters diff acme/ner:v1 acme/ner:v2
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            with output.transfer("fetching") as progress:
                found = await client.diff(a, b, progress=progress)
        output.result(found, *difference_report(found))

    execute(as_json, work)


def difference_report(found: VersionDifference) -> list[RenderableType]:
    """What differs, table by table."""
    if found.a.digest == found.b.digest:
        return [Text(f"{found.a.ref} and {found.b.ref} are the same version")]
    report: list[RenderableType] = [Text(f"A is {found.a.ref}, B is {found.b.ref}")]
    rows: list[_Row] = [(one.field, _shown(one.a), _shown(one.b)) for one in found.fields]
    report += _table(("field", "A", "B"), rows)
    rows = [(one.module, _shown(one.a), _shown(one.b)) for one in found.modules]
    report += _table(("module", "A", "B"), rows)
    rows = [
        (one.task, one.dataset, one.split, one.metric, _shown(one.a), _shown(one.b)) for one in found.metrics
    ]
    report += _table(("task", "data set", "split", "metric", "A", "B"), rows)
    return report + _weights(found)


def _weights(found: VersionDifference) -> list[RenderableType]:
    if found.tensors is None:
        return ["", Text("the weights can't be compared: a version is revoked")]
    # What has no measure because A is zero there has changed most.
    changes = sorted(found.tensors, key=lambda one: (one.relative is not None, -(one.relative or 0.0)))
    rows: list[_Row] = [(one.module, _change(one.relative)) for one in changes]
    if not rows:
        return ["", Text("no module is in both with tensors of equal shapes")]
    return _table(("module", "relative change"), rows)


def _change(relative: float | None) -> str:
    return "from zero" if relative is None else f"{relative:.4g}"


def _table(columns: tuple[str, ...], rows: list[_Row]) -> list[RenderableType]:
    """A table, cut where it gets long; nothing for no rows."""
    if not rows:
        return []
    shown = table(*columns)
    for row in rows[:_ROWS]:
        shown.add_row(*row)
    more = len(rows) - _ROWS
    cut: list[RenderableType] = [Text(f"... and {more} more, see --json")] if more > 0 else []
    return ["", shown, *cut]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:159] + "…"
