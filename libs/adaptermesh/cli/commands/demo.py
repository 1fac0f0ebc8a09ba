"""`adaptermesh demo`: the guided demonstration."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from adaptermesh.cli.commands.up import DemoFileOption, until_stopped
from adaptermesh.cli.demo.plan import find_plan, load_plan
from adaptermesh.cli.demo.script import Stage, run_demo
from adaptermesh.cli.execute import INTERRUPTED, execute
from adaptermesh.cli.mesh_events import EventPrinter, spinner
from adaptermesh.cli.options import HomeOption, JsonOption
from adaptermesh.cli.output import Output
from adaptermesh.core.clock import SystemClock
from adaptermesh.local import LocalMesh, LocalMeshConfig


def demo(
    workers: Annotated[int, typer.Option(min=1, max=8, help="How many workers.")] = 1,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="Where the demo keeps its data. Default: a new temporary folder.",
        ),
    ] = None,
    demo_file: DemoFileOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Starts a mesh of its own, shows what it does, checks that it is true, and stops it again.

    It uploads real adapters, sends interleaved requests, swaps a version while requests stream and rolls it
    back, traces a cold switch and measures cold, cool and warm ones. Exit code 1 if anything is not as it
    must be.
    Base models come from --home; everything else is kept apart.

    Example: adaptermesh demo
    """

    async def work(output: Output) -> None:
        file = find_plan(demo_file)
        plan = load_plan(file)
        models = (home or output.settings.home).expanduser().resolve() / "models"
        config = LocalMeshConfig(
            home=(data or Path(tempfile.mkdtemp(prefix="adaptermesh-demo-"))).resolve(),
            models=models,
            model=plan.base_model,
            workers=workers,
            ephemeral_ports=True,
        )
        mesh = LocalMesh(config, on_event=EventPrinter(output, as_json=False))

        async def show() -> None:
            with spinner(output, "starting"):
                await mesh.start()
            await run_demo(Stage(output, mesh, plan, file.parent, SystemClock()))

        if not await until_stopped(output, mesh, show()):
            raise typer.Exit(INTERRUPTED)

    execute(as_json, work)
