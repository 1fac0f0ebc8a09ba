"""What can be asked of a search, and the documents that its conditions leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy import ColumnElement, Select, exists, select

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import invalid_field
from adaptermesh.store.access.visibility import caller_scope, visible
from adaptermesh.store.fields import check_text
from adaptermesh.store.listing import MAX_CONDITION, MAX_TAGS
from adaptermesh.store.schema import adapters, namespaces, search_documents, search_languages, search_tags
from adaptermesh.store.words import MAX_WORDS, words_of

DEFAULT_METRIC = "accuracy"
_TEXTS = ("text", "namespace", "tenant", "base_model", "task", "kind", "license", "language", "score_metric")
_EXACT = ("task", "kind", "license")


class Order(Enum):
    """In which order adapters come."""

    RELEVANCE = "relevance"
    NEWEST = "newest"
    NAME = "name"
    DOWNLOADS = "downloads"
    SCORE = "score"


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """Conditions that must all hold, of the newest version; an empty one matches all."""

    text: str = ""
    namespace: str = ""
    tenant: str = ""
    """Whose the namespace is."""
    base_model: str = ""
    """Name or digest."""
    task: str = ""
    kind: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    order: Order | None = None
    """None: by relevance where there are words, else the newest first."""
    language: str = ""
    score_metric: str = ""
    """The order of scores is by this "metric" or "task/metric"; only who has it is found. Empty: accuracy."""
    lowest_score_first: bool = False

    @property
    def metric(self) -> str:
        return self.score_metric or DEFAULT_METRIC

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those that are set, apart from words and order."""
        fields = (
            self.namespace,
            self.tenant,
            self.base_model,
            self.task,
            self.kind,
            self.license,
            self.language,
        )
        return tuple(value for value in (*fields, *self.tags) if value)

    def scope(self, words: Sequence[str], order: Order) -> list[Any]:
        """What makes it another list: a page token belongs to one."""
        fields = [self.namespace, self.base_model, self.task, self.kind, self.license, self.language]
        whose: list[Any] = [self.tenant, *caller_scope()]
        by = [self.metric, self.lowest_score_first] if order is Order.SCORE else []
        return ["search", order.value, list(words), sorted(set(self.tags)), *fields, *whose, *by]


def checked_words(query: SearchQuery) -> list[str]:
    """The words that are asked for; raises MeshError INVALID_FIELD for what can't be asked."""
    for field in _TEXTS:
        check_text(field, getattr(query, field), MAX_CONDITION)
    if len(query.tags) > MAX_TAGS:
        raise invalid_field("tags", f"at most {MAX_TAGS} are allowed")
    words = words_of(query.text)
    if len(words) > MAX_WORDS:
        raise invalid_field("text", f"has {len(words)} words, at most {MAX_WORDS} are allowed")
    if query.text.strip() and not words:
        raise invalid_field("text", "has no word of letters or digits")
    return words


def documents(query: SearchQuery) -> Select[Any]:
    """The documents that the conditions leave, by `adapter_id`; their adapters are joined."""
    statement: Select[Any] = select(search_documents.c.adapter_id)
    if query.tags:
        statement = statement.join(
            search_tags, search_tags.c.adapter_id == search_documents.c.adapter_id
        ).where(search_tags.c.tag == min(query.tags))
    elif query.language:
        statement = statement.join(
            search_languages, search_languages.c.adapter_id == search_documents.c.adapter_id
        ).where(search_languages.c.language == query.language)
    return statement.join(adapters, adapters.c.id == search_documents.c.adapter_id).where(*_conditions(query))


def newest_position(query: SearchQuery) -> ColumnElement[int]:
    """The position of the newest version, from the table whose index has it in order."""
    if query.tags:
        return search_tags.c.feed_position
    return search_languages.c.feed_position if query.language else search_documents.c.feed_position


def _conditions(query: SearchQuery) -> list[ColumnElement[bool]]:
    columns = search_documents.c
    conditions: list[ColumnElement[bool]] = []
    if (seen := visible()) is not None:
        conditions.append(seen)
    if query.tenant:
        owned = select(namespaces.c.name).where(namespaces.c.tenant == query.tenant)
        conditions.append(adapters.c.namespace.in_(owned))
    if query.namespace:
        conditions.append(adapters.c.namespace == query.namespace)
    if query.base_model:
        column = columns.base_digest if is_digest(query.base_model) else columns.base_model_id
        conditions.append(column == query.base_model)
    exact = ((field, getattr(query, field)) for field in _EXACT)
    conditions.extend(columns[field] == value for field, value in exact if value)
    # The first one is joined.
    for tag in sorted(set(query.tags))[1:]:
        other = search_tags.alias()
        same = (other.c.adapter_id == columns.adapter_id) & (other.c.tag == tag)
        conditions.append(exists(select(other.c.tag).where(same)))
    if query.tags and query.language:
        spoken = search_languages.alias()
        same = (spoken.c.adapter_id == columns.adapter_id) & (spoken.c.language == query.language)
        conditions.append(exists(select(spoken.c.language).where(same)))
    return conditions
