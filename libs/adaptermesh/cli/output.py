"""What a command prints: one JSON document, JSON lines, or something to read."""

import dataclasses
import datetime
import enum
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)

from adaptermesh.cli.settings import CliSettings
from adaptermesh.client import Progress as TransferProgress
from adaptermesh.client import ProgressCallback

_PLAIN_WIDTH = 120

ShowStep = Callable[[str, int, int], None]
"""Shows what is being done, how much of it is done, and of how much."""


class Output:
    """Results go to standard output, everything else to standard error.

    With `as_json` standard output carries JSON only, and nothing but errors goes to standard error.
    """

    def __init__(self, settings: CliSettings, *, as_json: bool) -> None:
        self.settings = settings
        self.as_json = as_json
        self.console = _console(settings, sys.stdout)
        self.errors = _console(settings, sys.stderr)

    def result(self, value: Any, *readable: RenderableType) -> None:
        """The command's result: `value` as the one JSON document, or what there is to read."""
        if self.as_json:
            self.line(value)
            return
        for renderable in readable:
            self.console.print(renderable)

    def line(self, value: Any) -> None:
        """One line of JSON."""
        sys.stdout.write(json.dumps(jsonable(value), ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """A piece of generated text, as it is and at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, *readable: RenderableType) -> None:
        """Something to read beside the result."""
        if not self.as_json:
            for renderable in readable:
                self.errors.print(renderable)

    @contextmanager
    def transfer(self, title: str) -> Iterator[ProgressCallback | None]:
        """A progress bar for bytes; None where nobody watches."""
        if self.as_json or not self.errors.is_terminal:
            yield None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=self.errors, transient=True) as bar:
            task = bar.add_task(title, total=None)

            def on_progress(progress: TransferProgress) -> None:
                bar.update(
                    task,
                    total=progress.total_bytes,
                    completed=progress.done_bytes,
                    description=f"{title} {progress.path}",
                )

            yield on_progress

    @contextmanager
    def steps(self) -> Iterator[ShowStep]:
        """A bar for work of several kinds, each counted in its own unit; any thread may move it."""
        if self.as_json or not self.errors.is_terminal:
            yield _show_nothing
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Progress(*columns, console=self.errors, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


def _show_nothing(what: str, done: int, of: int) -> None:
    del what, done, of


def jsonable(value: Any) -> Any:
    """Records, times, paths and enums as JSON values. A record's `ref` is part of it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        ref = getattr(value, "ref", None)
        return {"ref": ref, **fields} if ref is not None else fields
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return json.loads(value) if value else None
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _console(settings: CliSettings, file: TextIO) -> Console:
    """Refs and descriptions hold brackets and colons: nothing in a text is markup."""
    width = settings.columns or (None if file.isatty() else _PLAIN_WIDTH)
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)
