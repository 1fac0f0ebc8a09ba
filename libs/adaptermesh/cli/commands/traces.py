"""`adaptermesh trace`: ls, show."""

import asyncio
import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import HomeOption, JsonOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import table
from adaptermesh.cli.waterfall import Waterfall, describe, tree_of
from adaptermesh.telemetry.trace_reader import SpanRecord, TraceSummary, list_traces, load_trace

app = typer.Typer(no_args_is_help=True, help="Read the traces that the services write on this machine.")

DirectoryOption = Annotated[
    Path | None,
    typer.Option("--traces", metavar="DIR", file_okay=False, help="The trace files. Default: <home>/traces."),
]


@app.command("ls")
def list_recent(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many.")] = 20,
    traces: DirectoryOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lists the newest traces.

    Example: adaptermesh trace ls -n 5
    """

    async def work(output: Output) -> None:
        directory = _directory(output, traces, home)
        found = await asyncio.to_thread(list_traces, directory, limit)
        nothing = Text(f"no traces in {directory}")
        output.result({"traces": found}, _list(found) if found else nothing)

    execute(as_json, work)


@app.command()
def show(
    trace_id: Annotated[str, typer.Argument(metavar="ID", help="A trace's id, or its first digits.")],
    attributes: Annotated[
        bool, typer.Option("--attributes", "-a", help="Everything each span says.")
    ] = False,
    traces: DirectoryOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draws one trace as a waterfall over all services.

    A fetch that this request shared with another one is marked (shared).

    Examples:
    adaptermesh trace show 4bf92f35

    adaptermesh trace show 4bf92f35 --attributes
    """

    async def work(output: Output) -> None:
        spans = await asyncio.to_thread(load_trace, _directory(output, traces, home), trace_id)
        details = _attributes(spans) if attributes else []
        output.result({"spans": spans}, *waterfall(spans), *details)

    execute(as_json, work)


def waterfall(spans: list[SpanRecord]) -> list[RenderableType]:
    """A trace's description and its waterfall."""
    return [
        *(Text(line, "bold" if not index else "") for index, line in enumerate(describe(spans))),
        Waterfall(spans),
    ]


def _directory(output: Output, traces: Path | None, home: Path | None) -> Path:
    if traces is not None:
        return traces
    return home / "traces" if home is not None else output.settings.trace_dir


def _list(traces: list[TraceSummary]) -> RenderableType:
    rows = table(
        "trace", "when", "took", "spans", "what", "version", "switch", "status", right=("took", "spans")
    )
    for trace in traces:
        get = trace.attributes.get
        started = datetime.datetime.fromtimestamp(trace.start_ns / 1e9).astimezone()
        rows.add_row(
            trace.trace_id[:12],
            started.strftime("%m-%d %H:%M:%S"),
            f"{trace.duration_ns / 1e6:.1f} ms",
            str(trace.span_count),
            trace.root_name.rpartition(".")[2] if "/" in trace.root_name else trace.root_name,
            str(get("adaptermesh.adapter.version", "")),
            str(get("adaptermesh.switch.kind", "")),
            Text("failed", "red") if trace.error else "ok",
        )
    return rows


def _attributes(spans: list[SpanRecord]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for row in tree_of(spans):
        parts.append(Text(f"\n{row.span.name}  ({row.span.service} {row.span.instance})", "bold"))
        parts += [
            Text(f"  {name} = {value}", no_wrap=True, overflow="ignore")
            for name, value in sorted(row.span.attributes.items())
        ]
    return parts
