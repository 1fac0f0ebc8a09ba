"""`adaptermesh models`: the base models in this machine's cache."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from adaptermesh.cli.options import HomeOption, JsonOption
from adaptermesh.cli.settings import CliSettings

app = typer.Typer(no_args_is_help=True, help="Fetch base models into the cache and list them.")


@app.command()
def pull(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|ORG/NAME|DIR", help="A known base model, one of the hub, or a folder."),
    ],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetches a base model and records its digests; a model that is there already is left alone.

    Example: adaptermesh models pull smollm2-135m-instruct
    """
    _worker_models(["pull", name], home, as_json)


@app.command("ls")
def list_models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Lists the base models in the cache.

    Example: adaptermesh models ls
    """
    _worker_models(["ls"], home, as_json)


def _worker_models(arguments: list[str], home: Path | None, as_json: bool) -> None:
    """Runs the worker's own tool, the only one that knows model files, and ends with its exit code."""
    command = [sys.executable, "-m", "adaptermesh.worker.models", *arguments]
    command += ["--home", str(home or CliSettings().home)]
    command += ["--json"] if as_json else []
    # No time limit: how long a download may take is for whoever watches it to say.
    done = subprocess.run(command, check=False)  # noqa: S603  # our own module, arguments as a list
    raise typer.Exit(done.returncode)
