"""Runs a command: settings, output, event loop, exit code."""

import asyncio
from collections.abc import Awaitable, Callable

import typer
from pydantic import ValidationError

from adaptermesh.cli.failures import print_failure, print_mesh_error
from adaptermesh.cli.output import Output
from adaptermesh.cli.settings import CliSettings
from adaptermesh.client import MeshError
from adaptermesh.local import LocalMeshError

FAILED = 1
USAGE = 2
INTERRUPTED = 130


class CommandError(Exception):
    """A command can't do what was asked; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def execute(as_json: bool, work: Callable[[Output], Awaitable[None]]) -> None:
    """Runs `work`; every failure it knows becomes `error: ...` and exit code 1."""
    output = Output(_settings(), as_json=as_json)
    try:
        asyncio.run(_run(work, output))
    except MeshError as error:
        print_mesh_error(output, error)
        raise typer.Exit(FAILED) from error
    except (LocalMeshError, CommandError) as error:
        print_failure(output, error.message, error.hint)
        if as_json:
            output.line({"error": {"message": error.message, "hint": error.hint}})
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read the output has read enough.
        raise typer.Exit(0) from None


async def _run(work: Callable[[Output], Awaitable[None]], output: Output) -> None:
    await work(output)


def _settings() -> CliSettings:
    try:
        return CliSettings()
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise typer.BadParameter(f"the environment holds a wrong setting: {problems}") from error
