"""What of a card can be searched beside its words: languages and scores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.schema import search_languages, search_scores

MAX_SCORES = 128
_MAX_METRIC = 200


@dataclass(frozen=True, slots=True)
class SearchFacts:
    """The languages that a card names, and its scores by "metric" and by "task/metric"."""

    languages: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


NO_FACTS = SearchFacts()


def search_facts(languages: Iterable[str], metrics: Iterable[Mapping[str, Any]]) -> SearchFacts:
    """From what a manifest has of the card. Of several results of one metric the first one counts."""
    scores: dict[str, float] = {}
    for entry in metrics:
        if entry["value"] is None:
            continue
        for name in (entry["metric"], f"{entry['task']}/{entry['metric']}" if entry["task"] else ""):
            if name and len(name) <= _MAX_METRIC and len(scores) < MAX_SCORES:
                scores.setdefault(name, float(entry["value"]))
    return SearchFacts(tuple(dict.fromkeys(languages)), scores)


async def put_facts(
    connection: AsyncConnection, adapter_id: int, feed_position: int, facts: SearchFacts
) -> None:
    """Replaces an adapter's facts, inside the caller's write transaction."""
    for table in (search_languages, search_scores):
        await connection.execute(delete(table).where(table.c.adapter_id == adapter_id))
    place = {"adapter_id": adapter_id, "feed_position": feed_position}
    if facts.languages:
        spoken = [{**place, "language": language} for language in facts.languages]
        await connection.execute(insert(search_languages), spoken)
    if facts.scores:
        scores = [
            {"adapter_id": adapter_id, "metric": metric, "value": value}
            for metric, value in facts.scores.items()
        ]
        await connection.execute(insert(search_scores), scores)
