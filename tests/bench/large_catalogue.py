"""A catalogue of many adapters, written into a store's database and folder in a few transactions."""

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import insert, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.digests import digest_bytes
from adaptermesh.store import schema
from adaptermesh.store.blobs import BlobStore, FolderBlobStore
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.store.records import ChangeKind, VersionRecord
from adaptermesh.store.rows import version_values
from adaptermesh.store.words import Wording, word_index
from tests.bench.bulk_rows import add_rows

FEED_ID = "bench"
VERSIONS = 3
"""Of each adapter."""
_SEED = 7
_AT_ONCE = 2000
_KINDS = ("lora", "lora", "lora", "dora", "ia3", "bottleneck")
_LICENSES = ("apache-2.0", "mit", "", "cc-by-4.0")
MANIFEST_BYTES = 32 * 1024
_CARD_WORDS = 100
_BASE = "sha256:" + "b" * 64


@dataclass(frozen=True, slots=True)
class Size:
    """How large the catalogue is."""

    adapters: int
    asked: int
    """Adapters whose manifests are there, so that they can be resolved."""
    events: int
    """The last changes of the feed."""


class Vocabulary:
    """Made-up words, the first ones said far more often than the last, as in any language."""

    def __init__(self, seed: int = _SEED) -> None:
        self._random = random.Random(seed)
        syllables = [a + b for a in "bcdfglmnprst" for b in "aeiou"]
        self.words = tuple(
            dict.fromkeys("".join(self._random.choices(syllables, k=3)) for _ in range(20_000))
        )
        self._weights = tuple(itertools.accumulate(1 / (place + 1) for place in range(len(self.words))))

    def text(self, count: int) -> str:
        """So many words."""
        return " ".join(self._random.choices(self.words, cum_weights=self._weights, k=count))


async def fill(home: Path, size: Size, database_url: str = "") -> None:
    """Fills the home folder of a store that does not run, and its database: its own unless one is given."""
    folder = home / "store"
    folder.mkdir(parents=True)
    url = database_url or f"sqlite+aiosqlite:///{folder / 'catalogue.db'}"
    database = Database(DatabaseConfig(url), lambda: None)
    await database.open(FEED_ID)
    blobs = FolderBlobStore(folder / "blobs")
    await blobs.recover()
    draw, vocabulary = random.Random(_SEED), Vocabulary()
    await database.write(_base)
    for start in range(0, size.adapters, _AT_ONCE):
        chunk = range(start, min(start + _AT_ONCE, size.adapters))
        records = [_versions(number, draw, vocabulary) for number in chunk]

        async def work(
            connection: AsyncConnection, start: int = start, records: Sequence[Any] = records
        ) -> None:
            await _adapters(connection, start, records, vocabulary, database.dialect)

        await database.write(work)
    for number in range(size.asked):
        await asyncio.gather(*(_put(blobs, home, _manifest(number, 1 + of)) for of in range(VERSIONS)))
    await _feed(database, size)
    await database.write(_gather_statistics)
    await database.close()


async def _gather_statistics(connection: AsyncConnection) -> None:
    """What PostgreSQL does by itself in the first minutes."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text("ANALYZE"))


def adapter_of(number: int) -> str:
    """The name of an adapter."""
    return f"team{number % 50}/adapter-{number}"


def _manifest(number: int, version: int) -> bytes:
    text = json.dumps({"adapter": adapter_of(number), "version": version})
    return text.encode().ljust(MANIFEST_BYTES)


async def _put(blobs: BlobStore, folder: Path, manifest: bytes) -> None:
    digest = digest_bytes(manifest)
    source = folder / digest
    await asyncio.to_thread(source.write_bytes, manifest)
    await blobs.put(digest, source)
    await asyncio.to_thread(source.unlink)


def _versions(number: int, draw: random.Random, vocabulary: Vocabulary) -> list[VersionRecord]:
    namespace, name = adapter_of(number).split("/")
    kind, license_ = draw.choice(_KINDS), draw.choice(_LICENSES)
    tags = tuple(sorted(set(vocabulary.text(3).split())))
    return [
        VersionRecord(
            namespace=namespace,
            name=name,
            number=version,
            digest=digest_bytes(_manifest(number, version)),
            base_digest=_BASE,
            base_model_id="base",
            task=f"task-{draw.randrange(200)}",
            description=vocabulary.text(10),
            tags=tags,
            license=license_,
            kind=kind,
            op_kinds=("lowrank",),
            max_rank=8,
            size_bytes=10_000_000,
            servable=True,
            unservable_reason="",
            warnings=(),
            create_time_us=number,
            source_files=(),
        )
        for version in range(1, VERSIONS + 1)
    ]


async def _base(connection: AsyncConnection) -> None:
    texts = dict.fromkeys(("model_id", "config_digest", "weights_digest", "architecture"), "x")
    numbers = dict.fromkeys(("hidden_size", "num_layers", "vocab_size", "feed_position"), 0)
    values = {"digest": _BASE, "config_json": "{}", **texts, **numbers}
    await connection.execute(insert(schema.base_models).values(values))


async def _adapters(
    connection: AsyncConnection,
    start: int,
    records: Sequence[Sequence[VersionRecord]],
    vocabulary: Vocabulary,
    dialect: str,
) -> None:
    """One chunk: what `Catalogue.publish` writes, many rows at a time."""
    rows: dict[Any, list[dict[str, Any]]] = {
        table: []
        for table in (
            schema.adapters,
            schema.versions,
            schema.version_tags,
            schema.search_documents,
            schema.search_tags,
            schema.alias_moves,
            schema.aliases,
        )
    }
    for adapter_id, versions in enumerate(records, start + 1):
        newest = versions[-1]
        name = {"namespace": newest.namespace, "name": newest.name}
        counts = {"version_count": VERSIONS, "newest_number": VERSIONS}
        rows[schema.adapters].append({"id": adapter_id, **name, **counts})
        for version in versions:
            key = (adapter_id - 1) * VERSIONS + version.number
            place = {"id": key, "adapter_id": adapter_id, "feed_position": key}
            columns = {**version_values(version), **place, "tensor_digest": version.digest}
            rows[schema.versions].append(columns)
            rows[schema.version_tags] += [{"version_id": key, "tag": tag} for tag in version.tags]
        searched = ("base_digest", "base_model_id", "task", "kind", "license")
        document = {field: getattr(newest, field) for field in searched}
        place = {"adapter_id": adapter_id, "version_id": key, "feed_position": key}
        rows[schema.search_documents].append({**document, **place})
        searched_tag = {"adapter_id": adapter_id, "feed_position": key}
        rows[schema.search_tags] += [{**searched_tag, "tag": tag} for tag in newest.tags]
        alias = {"adapter_id": adapter_id, "alias": "prod", "generation": 1}
        pointed = {"version_number": 2, "digest": versions[1].digest}
        move = {**pointed, "update_time_us": 0, "actor": "", "comment": ""}
        rows[schema.alias_moves].append({**alias, **move})
        rows[schema.aliases].append(alias)
    for table, values in rows.items():
        await add_rows(connection, table, values)
    wordings = {
        adapter_id: Wording(
            str(newest.adapter), " ".join(newest.tags), newest.description, vocabulary.text(_CARD_WORDS)
        )
        for adapter_id, (*_, newest) in enumerate(records, start + 1)
    }
    await word_index(dialect).add(connection, wordings)


async def _feed(database: Database, size: Size) -> None:
    """The versions' own positions are behind the feed's beginning; only the last changes are in it."""
    trimmed = size.adapters * VERSIONS
    draw, vocabulary, body = random.Random(_SEED), Vocabulary(), TypeAdapter(VersionRecord)
    rows = [
        {
            "position": trimmed + 1 + number,
            "commit_time_us": 0,
            "kind": ChangeKind.VERSION_PUBLISHED.value,
            "body": body.dump_json(_versions(number, draw, vocabulary)[0]).decode(),
        }
        for number in range(size.events)
    ]

    async def work(connection: AsyncConnection) -> None:
        positions = {"head_position": trimmed + size.events, "trimmed_position": trimmed}
        await connection.execute(update(schema.feed).values(positions))
        await add_rows(connection, schema.changes, rows)

    await database.write(work)
