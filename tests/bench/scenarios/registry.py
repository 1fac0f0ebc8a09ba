"""A store with many adapters: refs resolved, pages searched, and the change feed read again."""

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.rpc.channel import open_channel
from tests.bench.bench import Bench
from tests.bench.figures import Figure, Spread, percentile
from tests.bench.large_catalogue import FEED_ID, VERSIONS, Size, Vocabulary, adapter_of, fill
from tests.bench.peers.store_process import run_store
from tests.bench.result import Lane, Result
from tests.bench.workload import Scale

_PAGE = 50
_COMMON = 100
"""The words that are said most often."""


def run(bench: Bench) -> Result:
    scale = bench.scale
    size = Size(scale.catalogue, min(scale.catalogue, scale.lookups), scale.events)
    with tempfile.TemporaryDirectory(prefix="adaptermesh-bench-") as folder:
        home = Path(folder)
        print(f"  writing {size.adapters} adapters", flush=True)
        asyncio.run(fill(home, size))
        with run_store(home) as target:
            found = asyncio.run(_measure(bench, target, size))
    return Result(
        figures=(
            *(
                Figure(f"{name}, p99", _tail(found[name]), most, at_most=True, unit="ms")
                for name, most in (("resolve a ref", 5.0), *((name, 50.0) for name in _SEARCHES))
            ),
            Figure(
                f"{size.events} changes read again",
                Spread.of([seconds for [seconds] in found["feed"]]),
                1.0,
                at_most=True,
                unit="s",
            ),
        ),
        lanes=tuple(
            Lane(name, "ms", tuple(percentile(times, 50) * 1e3 for times in rounds))
            for name, rounds in found.items()
            if name != "feed"
        ),
    )


def _tail(rounds: list[list[float]]) -> Spread:
    """Over all rounds; the lowest and the highest round."""
    by_round = [percentile(times, 99) * 1e3 for times in rounds]
    every = percentile([seconds for times in rounds for seconds in times], 99) * 1e3
    return Spread(every, min(by_round), max(by_round))


async def _measure(bench: Bench, target: str, size: Size) -> dict[str, list[list[float]]]:
    async with open_channel(target) as channel:
        # The stubs are typed for both kinds of channels.
        stub: Any = store_pb2_grpc.StoreServiceStub(channel)
        draw, vocabulary = random.Random(1), Vocabulary()
        ways: dict[str, Callable[[], Awaitable[None]]] = {"resolve a ref": lambda: _resolve(stub, draw, size)}
        for name, fields in _SEARCHES.items():
            ways[name] = lambda fields=fields: _search(stub, fields(draw, vocabulary))  # type: ignore[misc]
        found: dict[str, list[list[float]]] = {name: [] for name in (*ways, "feed")}
        for number in (-1, *bench.rounds()):
            for name, way in ways.items():
                times = [await _timed(way) for _ in range(_count(bench.scale, name))]
                if number >= 0:
                    found[name].append(times)
            seconds = await _timed(lambda: _replay(stub, size))
            if number >= 0:
                found["feed"].append([seconds])
                print(f"  round {number + 1}", flush=True)
    return found


def _count(scale: Scale, name: str) -> int:
    return scale.lookups if name == "resolve a ref" else scale.searches


async def _timed(way: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await way()
    return time.perf_counter() - start


async def _resolve(stub: Any, draw: random.Random, size: Size) -> None:
    number = draw.randrange(size.asked)
    which = draw.choice(("@prod", *(f":v{version}" for version in range(1, VERSIONS + 1))))
    await stub.ResolveRef(store_pb2.ResolveRefRequest(ref=adapter_of(number) + which))


async def _search(stub: Any, fields: dict[str, Any]) -> None:
    await stub.SearchAdapters(store_pb2.SearchAdaptersRequest(page_size=_PAGE, **fields))


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


_SEARCHES: dict[str, Callable[[random.Random, Vocabulary], dict[str, Any]]] = {
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
