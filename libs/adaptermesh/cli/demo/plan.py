"""What the demonstration publishes and asks: `deploy/demo/demo.json`."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from adaptermesh.cli.execute import CommandError
from adaptermesh.core.errors import MeshError
from adaptermesh.core.refs import AdapterName

_FILE = Path("deploy", "demo", "demo.json")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DemoVersion(_Strict):
    """One folder to upload; `dir` is relative to the plan's file."""

    dir: str
    description: str = ""


class DemoAdapter(_Strict):
    """An adapter, its versions oldest first, and prompts that show what it does."""

    ref: str
    task: str
    versions: Annotated[tuple[DemoVersion, ...], Field(min_length=1)]
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    system: str = ""
    max_tokens: Annotated[int, Field(ge=1)] = 64
    license: str = ""
    tags: tuple[str, ...] = ()

    @field_validator("ref")
    @classmethod
    def _is_a_name(cls, ref: str) -> str:
        try:
            return str(AdapterName.parse(ref))
        except MeshError as error:
            raise ValueError(error.message) from error


class DemoPlan(_Strict):
    """All of it."""

    base_model: str
    adapters: Annotated[tuple[DemoAdapter, ...], Field(min_length=1)]


def find_plan(given: Path | None) -> Path:
    """The plan that was named, or the repository's.

    Raises:
        CommandError: there is none.
    """
    # libs/adaptermesh/cli/demo/plan.py in a source checkout.
    repository = Path(__file__).resolve().parents[4]
    candidates = [given] if given is not None else [Path.cwd() / _FILE, repository / _FILE]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise CommandError(
        f"there is no {' or '.join(map(str, candidates))}",
        "run this in a checkout of the repository, or name the file with --demo-file",
    )


def load_plan(file: Path) -> DemoPlan:
    """Reads a plan and checks that its adapters are there.

    Raises:
        CommandError: the file does not fit, or a folder is missing.
    """
    try:
        plan = DemoPlan.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CommandError(f"{file} is not a demonstration's plan: {problems}") from error
    missing = [
        version.dir
        for adapter in plan.adapters
        for version in adapter.versions
        if not (file.parent / version.dir / "adapter_config.json").is_file()
    ]
    if missing:
        raise CommandError(f"{file} names adapters that are not there: {', '.join(missing)}")
    return plan
