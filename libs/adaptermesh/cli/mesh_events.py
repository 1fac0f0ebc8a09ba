"""What a local mesh says while it starts, runs and stops."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import table
from adaptermesh.core.clock import Clock, SystemClock
from adaptermesh.local import EventKind, LocalMesh, MeshEvent

_COLORS = {
    EventKind.SERVING: "green",
    EventKind.CRASHED: "yellow",
    EventKind.GIVEN_UP: "bold red",
    EventKind.STARTING: "dim",
    EventKind.STOPPING: "dim",
    EventKind.STOPPED: "dim",
}


class EventPrinter:
    """Prints events as they happen: a line each, or a line of JSON."""

    def __init__(self, output: Output, *, as_json: bool, clock: Clock | None = None) -> None:
        self._output = output
        self._as_json = as_json
        self._clock = clock or SystemClock()
        self._started: dict[str, float] = {}

    def __call__(self, event: MeshEvent) -> None:
        """Takes one event of a mesh."""
        if self._as_json:
            self._output.line(
                {
                    "event": event.kind,
                    "service": event.service,
                    "address": event.address,
                    "pid": event.pid,
                    "message": event.message,
                }
            )
            return
        if event.kind is EventKind.STOPPING:
            return
        message = event.message
        if event.kind is EventKind.STARTING:
            self._started[event.service] = self._clock.monotonic()
            message = f"process {event.pid}"
        elif event.kind is EventKind.SERVING and event.service in self._started:
            message = f"after {self._clock.monotonic() - self._started[event.service]:.1f} s"
        line = Text(f"{event.service:<9} ")
        line.append(f"{event.kind.value:<9}", _COLORS[event.kind])
        line.append(f" {event.address:<16} {message}")
        self._output.note(line)


@contextmanager
def spinner(output: Output, text: str) -> Iterator[None]:
    """Something that moves while one waits, where somebody watches."""
    if output.as_json or not output.errors.is_terminal:
        yield
        return
    with output.errors.status(text):
        yield


def mesh_table(mesh: LocalMesh) -> RenderableType:
    """What runs where."""
    rows = table("service", "address", "process", "log", right=("process",))
    for name, address in addresses(mesh).items():
        rows.add_row(name, address, str(mesh.pid(name)), str(mesh.log_file(name)))
    return rows


def addresses(mesh: LocalMesh) -> dict[str, str]:
    """Each service's address, by name."""
    endpoints = mesh.endpoints
    named = {"gateway": endpoints.gateway, "router": endpoints.router, "store": endpoints.store}
    return named | {f"worker-{index}": address for index, address in enumerate(endpoints.workers)}


def mesh_document(mesh: LocalMesh) -> dict[str, object]:
    """What runs where, for programs."""
    return {
        "home": mesh.config.home,
        "traces": mesh.config.traces,
        "services": [
            {"service": name, "address": address, "pid": mesh.pid(name), "log": mesh.log_file(name)}
            for name, address in addresses(mesh).items()
        ],
    }
