"""An uploaded config: one bounded JSON object, and how what is wrong with it is told."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.strict_json import parse_object

MAX_CONFIG_BYTES = 256 * 1024
_MAX_DEPTH = 16

_Model = TypeVar("_Model", bound=BaseModel)


def read_config_file(path: str, place: Path, problems: Problems) -> Mapping[str, Any] | None:
    """The object in a config that the upload has at `path`; None, and the problem noted, if there is none."""
    size = place.stat().st_size
    if size > MAX_CONFIG_BYTES:
        problems.add(f"{path} has {size} bytes, more than {MAX_CONFIG_BYTES}")
        return None
    try:
        return parse_object(place.read_bytes(), _MAX_DEPTH)
    except ValueError as error:
        problems.add(f"{path} is not valid: {str(error)[:200]}")
        return None


def validated(
    model: type[_Model], values: Mapping[str, Any], where: str, problems: Problems
) -> _Model | None:
    """The values as a model; None, and every problem noted, if they are none. `where` begins each problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            key = ".".join(str(part)[:80] for part in item["loc"])
            found = "" if item["type"] == "missing" else f", found {shown(repr(item['input']), 60)}"
            problems.add(f"{where}: {key}: {item['msg']}{found}")
        return None


def check_unknown_keys(
    values: Mapping[str, Any], known: Collection[str], where: str, problems: Problems
) -> None:
    """Notes every key that is not known, unless it is switched off."""
    for key, value in values.items():
        # A key of another version of the library that is switched off changes nothing.
        if key in known or value is None or value is False or value in ("", [], {}):
            continue
        problems.add(
            f"{where}: the key {shown(key)} is unknown and set to {shown(repr(value), 60)}; "
            "remove it if it does not change what the adapter computes"
        )
