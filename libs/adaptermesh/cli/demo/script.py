"""The demonstration, step by step."""

from dataclasses import dataclass
from pathlib import Path

from rich.rule import Rule
from rich.text import Text

from adaptermesh.cli.commands.traces import waterfall
from adaptermesh.cli.demo.answers import answers_table, ask_everything, check_answers
from adaptermesh.cli.demo.checks import Checks
from adaptermesh.cli.demo.hot_swap import HotSwapStage, check_hot_swap, hot_swap_table
from adaptermesh.cli.demo.plan import DemoPlan
from adaptermesh.cli.demo.publish import Published, PublishedAdapter, publish
from adaptermesh.cli.demo.switches import (
    check_switches,
    measure_switches,
    switch_table,
    switch_times,
    trace_cold_switch,
)
from adaptermesh.cli.execute import CommandError
from adaptermesh.cli.mesh_events import mesh_document, mesh_table, spinner
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import short_digest, table
from adaptermesh.client import MeshClient, StoreClient
from adaptermesh.core.clock import Clock
from adaptermesh.local import LocalMesh


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the demonstration runs and what it shows."""

    output: Output
    mesh: LocalMesh
    plan: DemoPlan
    folder: Path
    """What the plan's folders are relative to."""
    clock: Clock


async def run_demo(stage: Stage) -> None:
    """Everything after the start of the mesh.

    Raises:
        CommandError: something that was shown is not what must have happened.
    """
    output, checks = stage.output, Checks()
    document: dict[str, object] = {"mesh": mesh_document(stage.mesh)}
    _title(output, "1  The mesh: four kinds of processes that speak gRPC on loopback")
    _show(output, mesh_table(stage.mesh))
    endpoints = stage.mesh.endpoints
    async with StoreClient(endpoints.store) as store, MeshClient(endpoints.gateway) as client:
        published = await _publish(stage, store, document)
        await _answers(stage, client, published, checks, document)
        await _hot_swap(stage, client, store, published, checks, document)
        await _switches(stage, client, published.adapters[0], checks, document)
    _conclude(stage, checks, document)


async def _publish(stage: Stage, store: StoreClient, document: dict[str, object]) -> Published:
    _title(stage.output, "2  Adapters into the store, a route for each task")
    with spinner(stage.output, "uploading"):
        published = await publish(store, stage.plan, stage.folder)
    rows = table("adapter", "digest", "task", "description")
    for adapter in published.adapters:
        for version in adapter.versions:
            rows.add_row(version.ref, short_digest(version.digest), version.task, version.description)
    _show(stage.output, rows, Text(""))
    routes = ", ".join(f"{adapter.plan.task} -> {adapter.alias}" for adapter in published.adapters)
    _show(stage.output, Text(f"routes: {routes}"))
    document["published"] = [version for adapter in published.adapters for version in adapter.versions]
    return published


async def _answers(
    stage: Stage, client: MeshClient, published: Published, checks: Checks, document: dict[str, object]
) -> None:
    _title(stage.output, "3  Interleaved, concurrent requests: by task, by ref, and to the bare base model")
    with spinner(stage.output, "asking"):
        answers = await ask_everything(client, published, stage.mesh.endpoints.workers)
    check_answers(answers, checks)
    _show(stage.output, *answers_table(answers))
    document["answers"] = [
        {
            "wave": answer.wave,
            "prompt": answer.question.prompt,
            "task": answer.question.task,
            "adapter": answer.question.adapter,
            "generation": answer.generation,
        }
        for answer in answers
    ]


async def _hot_swap(
    stage: Stage,
    client: MeshClient,
    store: StoreClient,
    published: Published,
    checks: Checks,
    document: dict[str, object],
) -> None:
    adapter = next((adapter for adapter in published.adapters if len(adapter.versions) > 1), None)
    if adapter is None:
        raise CommandError("no adapter of the plan has two versions, so none can be swapped")
    _title(
        stage.output, f"4  Hot swap: {adapter.alias} moves and moves back while {adapter.plan.task} is asked"
    )
    with spinner(stage.output, "swapping"):
        swap = await HotSwapStage(client, store, adapter, stage.clock).run(published.feed_position)
    check_hot_swap(swap, checks)
    _show(stage.output, hot_swap_table(swap))
    document["hot_swap"] = swap


async def _switches(
    stage: Stage,
    client: MeshClient,
    adapter: PublishedAdapter,
    checks: Checks,
    document: dict[str, object],
) -> None:
    workers = stage.mesh.endpoints.workers
    _title(stage.output, "5  One cold switch, traced over all four services")
    with spinner(stage.output, "tracing"):
        spans = await trace_cold_switch(client, workers, adapter, stage.mesh.config.traces, checks)
    if spans:
        _show(stage.output, *waterfall(spans))
    document["trace"] = spans
    _title(stage.output, "6  What a switch costs (medians, one request at a time)")
    with spinner(stage.output, "measuring"):
        samples = await measure_switches(client, workers, adapter)
    check_switches(samples, checks)
    _show(stage.output, switch_table(samples))
    document["switches"] = switch_times(samples)


def _conclude(stage: Stage, checks: Checks, document: dict[str, object]) -> None:
    output, config = stage.output, stage.mesh.config
    document["checks"] = checks.made
    _title(output, "Checks")
    for check in checks.made:
        mark = Text("ok    ", "green") if check.held else Text("FAILED", "bold red")
        _show(output, Text.assemble(mark, " ", check.what, f": {check.detail}" if check.detail else ""))
    _show(
        output,
        Text(f"\nlogs: {config.logs}\ntraces: adaptermesh trace ls --home {config.home}"),
    )
    if output.as_json:
        output.line(document)
    if checks.failed:
        raise CommandError(
            f"{len(checks.failed)} of {len(checks.made)} checks failed: {_first(checks)}",
            f"the logs are in {config.logs}",
        )


def _first(checks: Checks) -> str:
    check = checks.failed[0]
    return f"{check.what} ({check.detail})" if check.detail else check.what


def _title(output: Output, text: str) -> None:
    _show(output, Text(""), Rule(Text(text, "bold"), align="left"))


def _show(output: Output, *parts: object) -> None:
    if not output.as_json:
        for part in parts:
            output.console.print(part)
