"""`adaptermesh up`: the whole mesh on this machine, until Ctrl-C."""

import asyncio
import shlex
import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.demo.plan import DemoPlan, find_plan, load_plan
from adaptermesh.cli.demo.publish import publish
from adaptermesh.cli.execute import execute
from adaptermesh.cli.mesh_events import EventPrinter, mesh_document, mesh_table, spinner
from adaptermesh.cli.options import HomeOption, JsonOption
from adaptermesh.cli.output import Output
from adaptermesh.client import DEFAULT_GATEWAY
from adaptermesh.local import DEFAULT_MODEL, LocalMesh, LocalMeshConfig

PortOption = Annotated[int, typer.Option(min=1, max=65535)]
DemoFileOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", dir_okay=False, help="The plan. Default: deploy/demo/demo.json."),
]


def up(
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many workers.")] = 1,
    model: Annotated[str, typer.Option(help="A base model of the cache, or a folder.")] = DEFAULT_MODEL,
    with_demo_adapters: Annotated[
        bool, typer.Option("--with-demo-adapters", help="Upload the demo adapters and route their tasks.")
    ] = False,
    demo_file: DemoFileOption = None,
    home: HomeOption = None,
    gateway_port: PortOption = 7700,
    router_port: PortOption = 7701,
    store_port: PortOption = 7702,
    worker_port: Annotated[
        int, typer.Option(min=1, max=65535, help="The first worker's; the others take the next ones.")
    ] = 7710,
    ephemeral_ports: Annotated[bool, typer.Option("--ephemeral-ports", help="Take free ports.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Starts store, router, workers and gateway on this machine and keeps them running until Ctrl-C.

    A service that crashes is restarted. With --json each event is one line.

    Examples:
    adaptermesh up

    adaptermesh up --with-demo-adapters --workers 2
    """

    async def work(output: Output) -> None:
        file = find_plan(demo_file) if with_demo_adapters else None
        plan = load_plan(file) if file is not None else None
        config = LocalMeshConfig(
            home=(home or output.settings.home).expanduser().resolve(),
            model=model,
            workers=workers,
            gateway_port=gateway_port,
            router_port=router_port,
            store_port=store_port,
            worker_port=worker_port,
            ephemeral_ports=ephemeral_ports,
        )
        mesh = LocalMesh(config, on_event=EventPrinter(output, as_json=output.as_json))
        await until_stopped(output, mesh, _serve(output, mesh, plan, file))

    execute(as_json, work)


async def until_stopped(output: Output, mesh: LocalMesh, work: Awaitable[None]) -> bool:
    """Runs `work`, then stops the mesh; the first signal ends the work, the second one the patience.

    Returns:
        False if a signal ended the work.
    """
    stopping = asyncio.Event()
    running = asyncio.ensure_future(work)
    waiting = asyncio.create_task(stopping.wait())
    with _signals(output, mesh, stopping):
        try:
            await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            return running.done()
        finally:
            for task in (running, waiting):
                task.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)
            await mesh.stop()


@contextmanager
def _signals(output: Output, mesh: LocalMesh, stopping: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            mesh.kill_all()
            return
        stopping.set()
        output.note(Text("stopping; Ctrl-C again kills", "dim"))

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _serve(output: Output, mesh: LocalMesh, plan: DemoPlan | None, file: Path | None) -> None:
    with spinner(output, "starting"):
        await mesh.start()
    if plan is not None and file is not None:
        async with store_client(output, mesh.endpoints.store) as store:
            with spinner(output, "uploading the demo adapters"):
                await publish(store, plan, file.parent)
    if output.as_json:
        output.line({"event": "ready", **mesh_document(mesh)})
    else:
        output.console.print(mesh_table(mesh))
        output.console.print(Text(f"\n{_next_step(mesh, plan)}\nCtrl-C stops the mesh"))
    await mesh.wait_until_given_up()


def _next_step(mesh: LocalMesh, plan: DemoPlan | None) -> str:
    """A command that works now."""
    address = mesh.endpoints.gateway
    gateway = "" if address == DEFAULT_GATEWAY else f" --gateway {address}"
    if plan is None:
        return f'try: adaptermesh generate{gateway} "What is the capital of France?"'
    adapter = plan.adapters[0]
    return f"try: adaptermesh generate{gateway} --task {adapter.task} -v {shlex.quote(adapter.prompts[0])}"
