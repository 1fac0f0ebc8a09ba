"""What a card (README.md) says in its front matter, which is YAML from strangers.

The keys are those of Hugging Face's model cards: `license`, `language`, `tags`, `datasets`, `metrics` and
`model-index`. What can't be read is left out and warned of: a card never keeps an adapter out.
Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from adaptermesh.artifact.card_text import split_card

MAX_FRONT_MATTER_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_EVENTS = 10_000
MAX_LANGUAGES = 64
MAX_TAGS = 32
MAX_DATA_SETS = 64
MAX_METRICS = 256
MAX_WORD = 64
MAX_LINE = 256

# What the hub's tools add by themselves: they name the base by its place on somebody's disk.
_MADE_BY_TOOLS = "base_model:"
_NOTHING = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says in a form that can be searched and compared.

    `training_data` are `{"name"}`; `metrics` are `{"task", "dataset", "split", "metric", "value"}`, texts
    but for the value, which is None where the card names a metric without a number.
    """

    license: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    training_data: tuple[Mapping[str, Any], ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def card_facts(text: str) -> CardFacts:
    """Reads a card's front matter."""
    front, _ = split_card(text)
    if not front.strip():
        return CardFacts()
    try:
        fields = _parse(front)
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        return CardFacts(warnings=(f"the card's front matter can't be read: {why}",))
    left_out = _LeftOut()
    licenses = left_out.words("license", _texts(fields.get("license")), 1, MAX_LINE)
    return CardFacts(
        license=licenses[0] if licenses else "",
        languages=left_out.words("language", _texts(fields.get("language")), MAX_LANGUAGES, MAX_WORD),
        tags=left_out.words("tags", _own_tags(fields.get("tags")), MAX_TAGS, MAX_WORD),
        training_data=tuple(
            {"name": name}
            for name in left_out.words("datasets", _texts(fields.get("datasets")), MAX_DATA_SETS, MAX_LINE)
        ),
        metrics=_metrics(fields, left_out),
        warnings=left_out.warnings(),
    )


class _LeftOut:
    """Counts what of each key is not taken."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, key: str, count: int = 1) -> None:
        if count > 0:
            self._counts[key] = self._counts.get(key, 0) + count

    def words(self, key: str, values: Iterable[str], limit: int, length: int) -> tuple[str, ...]:
        """The printable ones of at most `length` characters, each once, at most `limit`."""
        given = list(dict.fromkeys(values))
        fit = [value for value in given if 0 < len(value) <= length and value.isprintable()]
        self.note(key, len(given) - len(fit[:limit]))
        return tuple(fit[:limit])

    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"the card's '{key}': {count} of its values are not taken" for key, count in self._counts.items()
        )


def _parse(front: str) -> Mapping[str, Any]:
    """The front matter as texts, lists and objects.

    Raises:
        ValueError: it is too long, nests too deep, refers to other parts of itself, or is no object.
        yaml.YAMLError: it is not YAML.
    """
    if len(front.encode()) > MAX_FRONT_MATTER_BYTES:
        raise ValueError(f"it has more than {MAX_FRONT_MATTER_BYTES} bytes")
    _check_events(front)
    # Every scalar stays a text: no number, date or boolean ("no" is Norwegian) is made of it.
    fields = yaml.load(front, Loader=yaml.BaseLoader)  # noqa: S506 - it builds texts, lists and objects only
    if not isinstance(fields, dict):
        raise ValueError("it is not a list of keys and values")  # noqa: TRY004 - about content
    return fields


def _check_events(front: str) -> None:
    """Bounds depth and size before anything is built; the parser itself does not recurse."""
    depth = 0
    for count, event in enumerate(yaml.parse(front, Loader=yaml.BaseLoader)):
        if count >= MAX_EVENTS:
            raise ValueError(f"it has more than {MAX_EVENTS} parts")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it refers to another part of itself")  # noqa: TRY004 - about content
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH}")


def _texts(value: object) -> Iterator[str]:
    """The texts of a text or of a list of them."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and one.strip() not in _NOTHING:
            yield one.strip()


def _own_tags(value: object) -> Iterator[str]:
    return (tag for tag in _texts(value) if not tag.startswith(_MADE_BY_TOOLS))


def _metrics(fields: Mapping[str, Any], left_out: _LeftOut) -> tuple[Mapping[str, Any], ...]:
    """Those with a value from the model index, and what `metrics` names beside them."""
    found: list[Mapping[str, Any]] = []
    for result in _results(fields.get("model-index"), left_out):
        place = _place(result)
        for entry in _objects(result.get("metrics"), "model-index", left_out):
            metric, value = _line(entry.get("type")) or _line(entry.get("name")), _number(entry.get("value"))
            if metric and value is not None:
                found.append({**place, "metric": metric, "value": value})
            else:
                left_out.note("model-index")
    measured = {entry["metric"] for entry in found}
    nowhere = {"task": "", "dataset": "", "split": ""}
    for name in left_out.words("metrics", _texts(fields.get("metrics")), MAX_METRICS, MAX_LINE):
        if name not in measured:
            found += [{**nowhere, "metric": name, "value": None}]
    left_out.note("metrics", len(found) - MAX_METRICS)
    return tuple(found[:MAX_METRICS])


def _results(index: object, left_out: _LeftOut) -> Iterator[Mapping[str, Any]]:
    for model in _objects(index, "model-index", left_out):
        yield from _objects(model.get("results"), "model-index", left_out)


def _place(result: Mapping[str, Any]) -> dict[str, str]:
    """What a result was measured on."""
    task, data = _object(result.get("task")), _object(result.get("dataset"))
    return {
        "task": _line(task.get("type")) or _line(task.get("name")),
        "dataset": _line(data.get("type")) or _line(data.get("name")),
        "split": _line(data.get("split")),
    }


def _objects(value: object, key: str, left_out: _LeftOut) -> Iterator[Mapping[str, Any]]:
    """The objects of a list of them; what else is there is noted."""
    if value is None or value in _NOTHING:
        return
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict):
            yield one
        else:
            left_out.note(key)


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _line(value: object) -> str:
    """A text that fits into a line; empty for anything else."""
    text = value.strip() if isinstance(value, str) else ""
    return text if len(text) <= MAX_LINE and text.isprintable() else ""


def _number(value: object) -> float | None:
    if not isinstance(value, str) or len(value) > MAX_WORD:
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
