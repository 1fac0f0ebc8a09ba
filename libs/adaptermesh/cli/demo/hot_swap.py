"""A task's alias moves to a second version and back while requests stream."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.demo.checks import Checks
from adaptermesh.cli.demo.publish import ALIAS, PublishedAdapter
from adaptermesh.cli.tables import table
from adaptermesh.client import (
    AliasMove,
    Ask,
    Event,
    MeshClient,
    Prompt,
    SamplingParams,
    Started,
    StoreClient,
    Version,
)
from adaptermesh.core.clock import Clock

CALLERS = 3
LIMIT_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Move:
    """The alias moved to `version` between the two moments, in seconds since the first request."""

    title: str
    version: Version
    begun_at: float
    done_at: float
    feed_position: int


@dataclass(frozen=True, slots=True)
class Served:
    """One request of a caller: when it was sent, admitted and finished, and by what it was served."""

    caller: int
    sent_at: float
    started_at: float
    finished_at: float
    version: str
    digest: str
    text: str


@dataclass(frozen=True, slots=True)
class HotSwap:
    """The first version, the moves, and every request in the order of sending."""

    first: Version
    moves: tuple[Move, ...]
    served: tuple[Served, ...]


class HotSwapStage:
    """Callers that send one request after the other while an operator moves the alias."""

    def __init__(self, mesh: MeshClient, store: StoreClient, adapter: PublishedAdapter, clock: Clock) -> None:
        self._mesh = mesh
        self._store = store
        self._adapter = adapter
        self._clock = clock
        self._begun = clock.monotonic()
        self._position = 0
        self._ended = asyncio.Event()
        self._news = asyncio.Event()
        self._streaming: dict[int, str] = {}
        self._served: list[Served] = []

    async def run(self, feed_position: int) -> HotSwap:
        """Moves the alias forward and back, each time while every caller's stream is under way."""
        self._position = feed_position
        alias = self._adapter.alias
        old, new = self._adapter.versions[:2]
        async with asyncio.timeout(LIMIT_SECONDS), asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(self._call(caller))
            try:
                await self._all_stream(old)
                swap = await self._move(
                    f"@{ALIAS} -> v{new.number}",
                    new,
                    lambda: self._store.set_alias(alias, new.number, actor="demo"),
                )
                await self._all_stream(new)
                back = await self._move(
                    f"rollback of @{ALIAS}", old, lambda: self._store.roll_back(alias, actor="demo")
                )
                await self._all_stream(old)
            finally:
                self._ended.set()
        return HotSwap(old, (swap, back), tuple(sorted(self._served, key=lambda served: served.sent_at)))

    async def _call(self, caller: int) -> None:
        plan = self._adapter.plan
        number = 0
        while not self._ended.is_set():
            prompt = plan.prompts[(caller + number) % len(plan.prompts)]
            number += 1
            await self._request(caller, Prompt.chat(prompt, system=plan.system))

    async def _request(self, caller: int, prompt: Prompt) -> None:
        sent_at, started_at = self._now(), 0.0

        def on_event(event: Event) -> None:
            nonlocal started_at
            if isinstance(event, Started):
                started_at = self._now()
                self._streaming[caller] = event.adapter_version
                self._news.set()

        stream = self._mesh.generate(
            prompt,
            task=self._adapter.plan.task,
            sampling=SamplingParams(max_tokens=self._adapter.plan.max_tokens, temperature=0.0),
            ask=Ask(min_feed_position=self._position),
        )
        async with stream:
            generation = await stream.collect(on_event)
        self._streaming.pop(caller, None)
        self._served.append(
            Served(
                caller,
                sent_at,
                started_at,
                self._now(),
                generation.version,
                generation.digest,
                generation.text.strip(),
            )
        )

    async def _all_stream(self, version: Version) -> None:
        """Waits until every caller has a request under way that this version serves."""
        while [self._streaming.get(caller) for caller in range(CALLERS)] != [version.ref] * CALLERS:
            self._news.clear()
            await self._news.wait()

    async def _move(self, title: str, version: Version, move: Callable[[], Awaitable[AliasMove]]) -> Move:
        begun_at = self._now()
        done = await move()
        # From here on requests ask for a decision that has seen the move.
        self._position = done.feed_position
        return Move(title, version, begun_at, self._now(), done.feed_position)

    def _now(self) -> float:
        return self._clock.monotonic() - self._begun


def check_hot_swap(swap: HotSwap, checks: Checks) -> None:
    """Each request must have been served by a version that the alias pointed to when it was resolved."""
    wrong = [
        f"caller {served.caller} at {served.sent_at:.2f} s got {served.version}"
        for served in swap.served
        if served.version not in possible_versions(swap, served)
    ]
    checks.expect(not wrong, "every request was served by the version its alias pointed to", "; ".join(wrong))
    before = swap.first
    for move in swap.moves:
        across = [served for served in swap.served if spans(served, move)]
        stayed = all(served.version == before.ref for served in across)
        checks.expect(
            bool(across) and stayed,
            f"streams that began before '{move.title}' finished on {before.ref}",
            "one changed its version" if across else "no stream was under way",
        )
        before = move.version
    served = {item.version for item in swap.served}
    wanted = {swap.first.ref, *(move.version.ref for move in swap.moves)}
    checks.expect(served == wanted, "both versions served requests", f"only {', '.join(sorted(served))} did")


def possible_versions(swap: HotSwap, served: Served) -> set[str]:
    """The versions that the alias pointed to at any moment between sending and admission."""
    possible = {swap.first.ref}
    for move in swap.moves:
        if served.sent_at >= move.done_at:
            possible = {move.version.ref}
        elif served.started_at >= move.begun_at:
            possible.add(move.version.ref)
    return possible


def spans(served: Served, move: Move) -> bool:
    """Whether a request was admitted before a move began and finished after it was done."""
    return served.started_at < move.begun_at and served.finished_at > move.done_at


def hot_swap_table(swap: HotSwap) -> RenderableType:
    """Every request and every move, in the order of time."""
    rows = table("at", "what", "served by", "until", "answer", right=("at", "until"))
    rows.columns[1].no_wrap = rows.columns[2].no_wrap = True
    timeline: list[tuple[float, Served | Move]] = [(item.sent_at, item) for item in swap.served]
    timeline += [(move.begun_at, move) for move in swap.moves]
    for at, item in sorted(timeline, key=lambda pair: pair[0]):
        if isinstance(item, Move):
            took = (item.done_at - item.begun_at) * 1000
            rows.add_row(
                f"{at:.2f} s", Text(f"{item.title} ({took:.0f} ms)", "bold yellow"), end_section=True
            )
            continue
        crossed = any(spans(item, move) for move in swap.moves)
        color = "cyan" if item.version == swap.first.ref else "magenta"
        rows.add_row(
            f"{at:.2f} s",
            f"caller {item.caller}" + (", across the move" if crossed else ""),
            Text(item.version, color),
            f"{item.finished_at:.2f} s",
            Text(item.text[:48], overflow="ellipsis", no_wrap=True),
        )
    return rows
