"""JSON from strangers: no repeated keys, no NaN, bounded depth."""

import json
from typing import Any


def parse_object(data: bytes, max_depth: int, max_parts: int | None = None) -> dict[str, Any]:
    """Parses one JSON object.

    Args:
        data: of a size that the caller has bounded.
        max_depth: how deep it may nest.
        max_parts: how many values it may hold, those in its texts that look like one included. In memory a
            value of three bytes may take a hundred.

    Raises:
        ValueError: it is not UTF-8, not JSON, not an object, repeats a key, holds a number that is not
            finite or a text that has no UTF-8 form, or exceeds one of the bounds.
    """
    if max_parts is not None and sum(map(data.count, (b",", b"[", b"{"))) > max_parts:
        raise ValueError(f"it has more than {max_parts} parts")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it nests deeper than {max_depth}") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")  # noqa: TRY004 - about content, not about the caller
    _check_depth(value, max_depth)
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate") from None
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:160]!r} is there twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any, max_depth: int) -> None:
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it nests deeper than {max_depth}")
