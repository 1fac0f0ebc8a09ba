"""What the adapters that a search finds have in common: how many have each value of each field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, func, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.schema import adapters, namespaces, search_documents, search_languages, search_tags

MAX_COUNTED = 5_000
"""Adapters that facets are counted over."""
MAX_VALUES = 20
"""Values of one facet."""
_FIELDS = ("base_model_id", "task", "kind", "license")
_ALL = "*"


@dataclass(frozen=True, slots=True)
class Facets:
    """Values and how many adapters have each, by field; `capped`: of the newest `MAX_COUNTED` only."""

    counts: Mapping[str, tuple[tuple[str, int], ...]]
    capped: bool


async def count_facets(connection: AsyncConnection, newest: Select[Any]) -> Facets:
    """Counts all facets in one statement, over one list of what matches.

    Args:
        connection: in a read transaction.
        newest: the adapters, by `adapter_id`, at most `MAX_COUNTED` + 1: the one too many only tells that
            there are more.
    """
    matched = newest.cte("matched")
    ids = select(matched.c.adapter_id)
    described = (
        select(*(search_documents.c[field] for field in _FIELDS))
        .where(search_documents.c.adapter_id.in_(ids))
        .cte("described")
    )
    total = select(literal(_ALL).label("field"), literal("").label("value"), func.count().label("count"))
    parts = [total.select_from(matched)]
    parts += [_counted(field, described.c[field]) for field in _FIELDS]
    parts.append(_counted("tags", search_tags.c.tag, search_tags.c.adapter_id.in_(ids)))
    parts.append(_counted("language", search_languages.c.language, search_languages.c.adapter_id.in_(ids)))
    whose = (namespaces.c.name == adapters.c.namespace) & adapters.c.id.in_(ids)
    parts.append(_counted("tenant", namespaces.c.tenant, whose))
    counts: dict[str, list[tuple[str, int]]] = {
        field.removesuffix("_id"): [] for field in (*_FIELDS, "tags", "language", "tenant")
    }
    capped = False
    for field, value, count in (await connection.execute(union_all(*parts))).all():
        if field == _ALL:
            capped = count > MAX_COUNTED
        else:
            counts[field.removesuffix("_id")].append((str(value), int(count)))
    ordered = {field: tuple(sorted(found, key=_most_frequent)) for field, found in counts.items()}
    return Facets(ordered, capped=capped)


def _counted(field: str, value: ColumnElement[str], *conditions: ColumnElement[bool]) -> Select[Any]:
    """The most frequent values of one field."""
    count = func.count().label("count")
    named = select(literal(field).label("field"), value.label("value"), count).where(*conditions)
    most = named.group_by(value).order_by(count.desc(), value).limit(MAX_VALUES).subquery()
    return select(most.c.field, most.c.value, most.c.count)


def _most_frequent(one: tuple[str, int]) -> tuple[int, str]:
    value, count = one
    return -count, value
