"""A store with many adapters: refs resolved, pages searched, and the change feed read again."""

import asyncio
import contextlib
import functools
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.rpc.channel import open_channel
from tests.bench.bench import Bench
from tests.bench.figures import Figure, Spread, percentile
from tests.bench.large_catalogue import FEED_ID, MANIFEST_BYTES, VERSIONS, Size, Vocabulary, adapter_of, fill
from tests.bench.peers.raw_server import SERVICE, UNARY, run_raw_server
from tests.bench.peers.store_process import run_store
from tests.bench.result import Lane, Result
from tests.bench.workload import Scale
from tests.postgres import BINARIES, running_postgres

_PAGE = 50
_COMMON = 100
"""The words that are said most often."""
_REQUEST_BYTES = 30
_RESOLVE = "resolve a ref"
_FEED = "feed"
_BARE = "bare unary call with an answer as large as a manifest"

Way = Callable[[], Awaitable[None]]
Fields = Callable[[random.Random, Vocabulary], dict[str, Any]]


def run(bench: Bench) -> Result:
    scale = bench.scale
    size = Size(scale.catalogue, min(scale.catalogue, scale.lookups), scale.events)
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptermesh-bench-")))
        answer = home / "answer"
        answer.write_bytes(bytes(MANIFEST_BYTES))
        targets = {"": f"127.0.0.1:{stack.enter_context(run_raw_server(answer))}"}
        databases = {"SQLite": ""}
        if (BINARIES / "postgres").exists():
            server = stack.enter_context(running_postgres(durable=True))
            databases["PostgreSQL"] = stack.enter_context(server.database())
        for name, url in databases.items():
            print(f"  writing {size.adapters} adapters into {name}", flush=True)
            asyncio.run(fill(home / name, size, url))
            settings = {"ADAPTERMESH_STORE_DATABASE_URL": url}
            targets[name] = stack.enter_context(run_store(home / name, settings))
        found = asyncio.run(_measure(bench, targets, size))
    return Result(
        figures=tuple(figure for name in databases for figure in _figures(name, found, size)),
        lanes=tuple(
            Lane(name, "ms", tuple(percentile(times, 50) * 1e3 for times in rounds))
            for name, rounds in found.items()
            if not name.endswith(_FEED)
        ),
        left_out=() if "PostgreSQL" in databases else ("PostgreSQL",),
    )


def _figures(database: str, found: dict[str, list[list[float]]], size: Size) -> list[Figure]:
    latencies = [(_RESOLVE, 5.0), *((name, 50.0) for name in _SEARCHES)]
    figures = [
        Figure(f"{database}: {name}, p99", _tail(found[f"{database}: {name}"]), most, at_most=True, unit="ms")
        for name, most in latencies
    ]
    replay = Spread.of([seconds for [seconds] in found[f"{database}: {_FEED}"]])
    name = f"{database}: {size.events} changes read again"
    return [*figures, Figure(name, replay, 1.0, at_most=True, unit="s")]


def _tail(rounds: list[list[float]]) -> Spread:
    """Over all rounds; the lowest and the highest round."""
    by_round = [percentile(times, 99) * 1e3 for times in rounds]
    every = percentile([seconds for times in rounds for seconds in times], 99) * 1e3
    return Spread(every, min(by_round), max(by_round))


async def _measure(bench: Bench, targets: dict[str, str], size: Size) -> dict[str, list[list[float]]]:
    """By lane and round; the lanes of all targets in turn, so that what slows the machine down hits all."""
    async with contextlib.AsyncExitStack() as stack:
        lanes: dict[str, tuple[Way, int]] = {}
        for name, target in targets.items():
            channel = await stack.enter_async_context(open_channel(target))
            if name:
                lanes |= {f"{name}: {lane}": way for lane, way in _ways(channel, bench.scale, size).items()}
            else:
                lanes[_BARE] = (functools.partial(_ask_bare, channel), bench.scale.lookups)
        found: dict[str, list[list[float]]] = {name: [] for name in lanes}
        for number in (-1, *bench.rounds()):
            for name, (way, count) in lanes.items():
                times = [await _timed(way) for _ in range(count)]
                if number >= 0:
                    found[name].append(times)
            if number >= 0:
                print(f"  round {number + 1}", flush=True)
    return found


def _ways(channel: grpc.aio.Channel, scale: Scale, size: Size) -> dict[str, tuple[Way, int]]:
    """What is asked of a store, and how often in one round."""
    # The stubs are typed for both kinds of channels.
    stub: Any = store_pb2_grpc.StoreServiceStub(channel)
    draw, vocabulary = random.Random(1), Vocabulary()
    ways: dict[str, tuple[Way, int]] = {_RESOLVE: (lambda: _resolve(stub, draw, size), scale.lookups)}
    for name, fields in _SEARCHES.items():
        way = functools.partial(_search, stub, fields, draw, vocabulary)
        ways[name] = (way, scale.searches)
    ways[_FEED] = (lambda: _replay(stub, size), 1)
    return ways


async def _timed(way: Way) -> float:
    start = time.perf_counter()
    await way()
    return time.perf_counter() - start


async def _ask_bare(channel: grpc.aio.Channel) -> None:
    call: Any = channel.unary_unary(f"/{SERVICE}/{UNARY}")
    await call(bytes(_REQUEST_BYTES))


async def _resolve(stub: Any, draw: random.Random, size: Size) -> None:
    number = draw.randrange(size.asked)
    which = draw.choice(("@prod", *(f":v{version}" for version in range(1, VERSIONS + 1))))
    await stub.ResolveRef(store_pb2.ResolveRefRequest(ref=adapter_of(number) + which))


async def _search(stub: Any, fields: Fields, draw: random.Random, vocabulary: Vocabulary) -> None:
    await stub.SearchAdapters(store_pb2.SearchAdaptersRequest(page_size=_PAGE, **fields(draw, vocabulary)))


def _any_word(draw: random.Random, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"text": draw.choice(vocabulary.words)}


def _common_words(draw: random.Random, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"text": " ".join(draw.sample(vocabulary.words[:_COMMON], 2))}


def _conditions(draw: random.Random, vocabulary: Vocabulary) -> dict[str, Any]:
    return draw.choice(
        (
            {"task": f"task-{draw.randrange(200)}"},
            {"kind": "dora", "license": "mit"},
            {"tags": [vocabulary.words[draw.randrange(1000)]]},
            {"namespace": f"team{draw.randrange(50)}", "order": store_pb2.SEARCH_ORDER_NAME},
            {},
        )
    )


def _facets(draw: random.Random, vocabulary: Vocabulary) -> dict[str, Any]:
    return {**_any_word(draw, vocabulary), "with_facets": True}


_SEARCHES: dict[str, Fields] = {
    "search by a word": _any_word,
    "search by two of the most common words": _common_words,
    "search by conditions": _conditions,
    "search by a word, with facets": _facets,
}


async def _replay(stub: Any, size: Size) -> None:
    start = size.adapters * VERSIONS
    request = store_pb2.WatchChangesRequest(feed_id=FEED_ID, after_position=start, batched=True)
    watch = stub.WatchChanges(request)
    async for message in watch:
        if message.changes and message.head_position == message.changes[-1].position:
            watch.cancel()
            return
