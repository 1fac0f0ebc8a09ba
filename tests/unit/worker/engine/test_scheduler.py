"""The order of admission: fair shares, priorities, adapters beyond the slots. Steps without a model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.core.errors import MeshError
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.fairness import TenantCounters
from adaptermesh.worker.engine.kv import BlockAllocator
from adaptermesh.worker.engine.request import Outcome, Request, Timeline
from adaptermesh.worker.engine.scheduler import Scheduler
from adaptermesh.worker.engine.sequence import Sequence, SequenceState
from adaptermesh.worker.engine.step_plan import StepPlan
from adaptermesh.worker.engine.text import TextStream
from adaptermesh.worker.engine.traits import Traits


class Deaf:
    def on_prompt(self, logprobs: Iterable[TokenLogprobs]) -> None: ...

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Iterable[TokenLogprobs] = ()) -> None: ...

    def on_finish(self, outcome: Outcome) -> None: ...

    def on_error(self, error: MeshError) -> None: ...


@dataclass
class FakePlacer:
    """A number of slots, idle ones for whoever asks; adapters arrive on the host, whole, at a given step."""

    slots: int
    empty_slots: int = 0
    arrives: dict[str, int] = field(default_factory=dict)
    step: int = 0
    uses: dict[str, int] = field(default_factory=dict)
    asked: int = 0
    pinned: set[str] = field(default_factory=set)

    def place(self, digest: str) -> int | None:
        self.asked += 1
        if digest not in self.uses:
            if not self._on_host(digest):
                return None
            idle = [other for other, uses in self.uses.items() if not uses and other not in self.pinned]
            if len(self.uses) >= self.slots:
                if not idle:
                    return None
                del self.uses[idle[0]]
            self.uses[digest] = 0
        self.uses[digest] += 1
        return list(self.uses).index(digest)

    def traits(self, digest: str) -> Traits | None:
        return Traits() if digest in self.uses or self._on_host(digest) else None

    def waits_for_slot(self, digest: str) -> bool:
        return digest not in self.uses and self._on_host(digest)

    def in_slot(self, digest: str) -> bool:
        return digest in self.uses

    def gives_way(self, digest: str) -> bool:
        return digest not in self.pinned

    def unplace(self, digest: str) -> None:
        self.uses[digest] -= 1
        assert self.uses[digest] >= 0

    def arrived(self, digest: str) -> int | None:
        return None if digest in self.uses or self._on_host(digest) else 0

    def place_early(self, digest: str) -> int | None:
        raise AssertionError(f"nothing of {digest} is here")

    def has_slot(self, digest: str) -> bool:
        return len(self.uses) < self.slots or not all(self.uses.values())

    def device_bytes(self, digest: str) -> int:
        return 0

    @property
    def device_room(self) -> float:
        return math.inf

    def stage_ahead(self, digest: str) -> None:
        raise AssertionError("no slot is empty")

    def _on_host(self, digest: str) -> bool:
        return self.arrives.get(digest, 0) <= self.step


class Line:
    """A scheduler whose steps are counted instead of computed."""

    def __init__(self, slots: int = 2, arrives: dict[str, int] | None = None, **config: Any) -> None:
        values = {
            "max_batch_rows": 4,
            "step_tokens": 16,
            "block_tokens": 4,
            "kv_tokens": 256,
            "prefix_cache": False,
            **config,
        }
        self.config = EngineConfig(disk_dir=Path(), device_slots=slots, **values)
        self.placer = FakePlacer(slots, arrives=arrives or {})
        self.blocks = BlockAllocator(self.config.kv_tokens // 4, 4)
        self.scheduler = Scheduler(self.config, self.blocks, self.placer)
        self.joined: list[str] = []
        self.ended: list[str] = []
        self.most_adapters = 0
        self._arrivals = 0

    def add(
        self,
        tenant: str = "t",
        digest: str | None = None,
        prompt: int = 1,
        output: int = 2,
        priority: int = 0,
        name: str = "",
        reuse_prefix: bool = True,
    ) -> Sequence:
        self._arrivals += 1
        params = SamplingParams(max_tokens=output)
        request = Request(
            name or f"r{self._arrivals}",
            tenant,
            digest,
            (1,) * prompt,
            params,
            priority=priority,
            reuse_prefix=reuse_prefix,
        )
        sequence = Sequence(
            request=request,
            listener=Deaf(),
            tokens=[1] * prompt,
            limit=prompt + output,
            seed=0,
            text=TextStream(lambda ids: "", ()),
            timeline=Timeline(),
            arrival=self._arrivals,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        self.placer.step += 1
        before = {id(sequence) for sequence in self.scheduler.running}
        plan = self.scheduler.plan()
        for sequence in self.scheduler.running:
            if id(sequence) not in before:
                self.joined.append(sequence.request.request_id)
        adapters = {row.sequence.digest for row in plan.rows} - {None}
        self.most_adapters = max(self.most_adapters, len(adapters))
        sampling = [row.sequence for row in plan.rows if row.samples]
        self.scheduler.book(plan.rows)
        for sequence in (row.sequence for row in plan.rows):
            if sequence in sampling:
                sequence.tokens.append(1)
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.end(sequence)
                self.ended.append(sequence.request.request_id)
        return plan

    def run(self, limit: int = 5000) -> None:
        """Steps until nothing is left."""
        for _ in range(limit):
            if not self.scheduler.running and not len(self.scheduler.waiting):
                return
            self.step()
        raise AssertionError("some requests never end")

    def counter(self, tenant: str) -> float:
        return self.scheduler._counters.served(tenant)


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [sequence.request.request_id for sequence in sequences]


# Order.


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    line = Line(max_batch_rows=1)
    for name in "abc":
        line.add(name=name)
    line.run()
    assert line.joined == ["a", "b", "c"]


def test_the_tenant_that_was_served_least_goes_first_even_within_a_step() -> None:
    line = Line(max_batch_rows=4, step_tokens=64)
    for number in range(6):
        line.add("flood", prompt=4, name=f"flood{number}")
    line.add("small", prompt=4, name="small0")
    line.add("small", prompt=4, name="small1")
    line.step()
    assert line.joined == ["flood0", "small0", "flood1", "small1"]


def test_higher_priority_goes_first_whatever_the_shares() -> None:
    line = Line(max_batch_rows=1)
    line.add("fresh", name="low", priority=-1)
    line.add("fresh", name="middle")
    line.add("served", name="high", priority=1)
    line.scheduler._counters.charge("served", 10_000, 0)
    line.run()
    assert line.joined == ["high", "middle", "low"]


def test_a_low_priority_ages_under_a_flood_of_high_ones() -> None:
    line = Line(max_batch_rows=1, priority_overtakes=3)
    line.add(name="low", priority=-2)
    line.add(name="lower", priority=-3)
    for _ in range(40):
        line.add(priority=0)
        line.step()
        line.step()
    # Two levels of three each, then the tie goes to the higher; one level and a tie more for the lower.
    assert line.joined.index("low") == 9
    assert line.joined.index("lower") < 14


def test_ageing_starts_anew_after_each_turn() -> None:
    line = Line(max_batch_rows=1, priority_overtakes=2)
    for number in range(3):
        line.add(name=f"low{number}", priority=-1)
    for _ in range(40):
        line.add(priority=0)
        line.step()
        line.step()
    turns = [line.joined.index(f"low{number}") for number in range(3)]
    gaps = [after - before for before, after in zip([-1, *turns], turns, strict=False)]
    assert len(set(gaps)) == 1
    assert gaps[0] <= 2 * 2 + 1


def test_a_removed_request_leaves_no_trace_in_the_queue() -> None:
    line = Line(max_overtakes=0)
    sequences = [line.add(f"t{n % 3}", f"d{n % 2}", prompt=n + 1, priority=n % 2) for n in range(8)]
    assert line.scheduler.waiting.tokens == 36
    assert len(line.scheduler.waiting.starving) == 8
    for sequence in sequences:
        line.scheduler.end(sequence)
        line.scheduler.end(sequence)
    waiting = line.scheduler.waiting
    assert (len(waiting), waiting.tokens, len(waiting.tenants), len(waiting.starving)) == (0, 0, 0, 0)
    assert list(waiting.in_order()) == []


def test_the_queue_gives_every_request_once_in_order() -> None:
    line = Line()
    line.add("a", name="1")
    line.add("b", name="2", priority=1)
    line.add("a", name="3")
    line.add("b", name="4")
    line.scheduler._counters.charge("a", 5, 0)
    assert names(line.scheduler.waiting.in_order()) == ["2", "4", "1", "3"]


# Counters.


def test_prompts_and_outputs_are_charged_with_their_weights() -> None:
    line = Line(step_tokens=4, prompt_token_weight=1.5, output_token_weight=4.0)
    line.add("t", prompt=10, output=3)
    line.run()
    assert line.counter("t") == 10 * 1.5 + 3 * 4.0


def test_what_a_preemption_computes_anew_is_not_charged_again() -> None:
    line = Line(kv_tokens=32, max_batch_rows=2)
    line.add("a", prompt=8, output=16)
    line.add("b", prompt=8, output=16)
    line.run()
    assert (line.counter("a"), line.counter("b")) == (8 + 32.0, 8 + 32.0)
    assert len(line.joined) > 2


def test_tokens_that_the_cache_knew_are_not_charged() -> None:
    line = Line(prefix_cache=True)
    line.add("t", prompt=8, output=1)
    line.run()
    before = line.counter("t")
    line.add("t", prompt=11, output=1)
    line.run()
    assert line.counter("t") - before == 3 + 2.0


def test_a_tenant_that_was_idle_saves_up_nothing() -> None:
    line = Line(max_batch_rows=1)
    line.add("early", prompt=1, output=1)
    line.run()
    for _ in range(20):
        line.add("busy", prompt=8, output=4)
    for _ in range(30):
        line.step()
    line.add("early")
    assert line.counter("early") == line.counter("busy") > 3.0


def test_a_tenant_that_finds_nobody_waiting_starts_where_the_last_one_left() -> None:
    line = Line()
    line.add("old", prompt=8, output=8)
    line.run()
    line.add("new")
    assert line.counter("new") == line.counter("old") == 8 + 16.0


def test_the_table_of_counters_is_bounded_and_keeps_the_busy() -> None:
    line = Line(tenant_counters=16, max_batch_rows=1)
    line.add("busy", prompt=1, output=200)
    line.step()
    counters: TenantCounters = line.scheduler._counters
    for number in range(200):
        sequence = line.add(f"t{number}")
        assert len(counters) <= 16
        line.scheduler.end(sequence)
    assert line.counter("busy") > 0


# Adapters beyond the slots.


def test_the_freed_slot_goes_to_the_starving_request_and_not_to_the_least_served_tenant() -> None:
    line = Line(slots=2, max_batch_rows=4, max_overtakes=2)
    line.add("heavy", "first", output=8)
    line.add("light", "third", output=1)
    line.step()
    starving = line.add("heavy", "second", name="starving")
    for number in range(100):
        # The heavy tenant goes on in its slot and is never the one served least; the others ask for the rest.
        line.add("heavy", "first", output=8)
        line.add(f"light{number}", ("third", "fourth")[number % 2], output=2)
        line.step()
        if starving.state is SequenceState.ENDED:
            break
    assert starving.state is SequenceState.ENDED


def test_a_step_has_no_more_adapters_than_its_limit_and_all_end() -> None:
    line = Line(slots=6, max_batch_rows=6, max_step_adapters=2, max_overtakes=2)
    for number in range(24):
        line.add(f"t{number % 3}", f"d{number % 6}", output=1 + number % 4)
    line.run()
    assert line.most_adapters == 2
    assert len(line.ended) == 24


def test_a_pinned_slot_is_not_drained_for_a_request_that_can_not_have_it() -> None:
    line = Line(slots=1, max_batch_rows=4, max_overtakes=1)
    line.placer.pinned = {"first"}
    for number in range(16):
        line.add("heavy", "first", output=2 + number % 4)
    waiting = line.add("light", "second")
    for _ in range(8):
        assert len(line.step().rows) == 4, "rows that end are followed by others"
    assert waiting in line.scheduler.waiting.starving
    line.placer.pinned.clear()
    for _ in range(12):
        line.step()
    assert waiting.state is SequenceState.ENDED


def test_the_limit_on_adapters_starves_nobody() -> None:
    line = Line(slots=4, max_batch_rows=2, max_step_adapters=1, max_overtakes=3)
    line.add(digest="popular", output=6)
    line.step()
    starving = line.add(digest="rare", name="rare")
    for _ in range(60):
        line.add(digest="popular", output=6)
        line.step()
        if starving.state is SequenceState.ENDED:
            break
    assert starving.state is SequenceState.ENDED


def test_a_full_queue_does_not_ask_for_a_slot_once_a_request() -> None:
    line = Line(slots=1, max_batch_rows=4)
    line.add(digest="running", output=9)
    line.step()
    for number in range(500):
        line.add(f"t{number % 50}", f"d{number % 100}")
    before = line.placer.asked
    line.step()
    assert line.placer.asked - before == 1


def test_a_request_whose_adapter_is_on_its_way_is_passed() -> None:
    line = Line(arrives={"late": 20})
    line.add("t", "late", name="late")
    line.add("t", "here", name="here")
    line.run()
    assert line.ended == ["here", "late"]


# Preemption.


def test_the_victim_is_of_the_lowest_priority_and_came_last() -> None:
    line = Line(max_batch_rows=4, kv_tokens=48)
    line.add(name="low1", prompt=8, output=20, priority=0)
    line.add(name="low2", prompt=4, output=20, priority=0)
    line.step()
    line.add(name="high", prompt=4, output=20, priority=1)
    gone: list[str] = []
    preempt = line.scheduler._preempt

    def remember(sequence: Sequence) -> None:
        gone.append(sequence.request.request_id)
        preempt(sequence)

    line.scheduler._preempt = remember  # type: ignore[method-assign]
    line.run()
    assert gone[0] == "low2"
    assert "high" not in gone
    assert sorted(line.ended) == ["high", "low1", "low2"]


def test_a_low_priority_that_got_its_row_by_age_does_not_lose_it_to_those_that_it_waited_for() -> None:
    line = Line(max_batch_rows=2, kv_tokens=32, priority_overtakes=1)
    gone: list[str] = []
    preempt = line.scheduler._preempt

    def remember(sequence: Sequence) -> None:
        gone.append(sequence.request.request_id)
        preempt(sequence)

    line.scheduler._preempt = remember  # type: ignore[method-assign]
    low = line.add(name="low", prompt=4, output=24, priority=-1)
    for _ in range(6):
        line.add(prompt=4, output=12, priority=0)
    line.run()
    assert low.level == 1
    assert gone
    assert "low" not in gone


# Properties.

arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it comes
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([None, "d0", "d1", "d2", "d3", "d4"]),
        st.integers(1, 20),
        st.integers(1, 12),
        st.sampled_from([-100, -1, 0, 1, 100]),
    ),
    min_size=1,
    max_size=30,
)


def computed(plan: StepPlan) -> dict[str, int]:
    """Tokens of each request's part of a step."""
    return {row.sequence.request.request_id: row.count for row in plan.rows}


def test_what_requests_share_is_computed_once_though_they_come_together() -> None:
    line = Line(prefix_cache=True)
    for name in ("a", "b", "c"):
        line.add(prompt=14, name=name)
    # Four blocks of four tokens would be in the step, but b and c would compute what a computes.
    assert computed(line.step()) == {"a": 14}
    assert computed(line.step()) == {"a": 1, "b": 2, "c": 2}


def test_who_waits_for_a_shared_prompt_is_passed_by_those_who_share_nothing() -> None:
    line = Line(prefix_cache=True)
    line.add(prompt=9, name="a")
    line.add(prompt=9, name="b")
    line.add("other tenant", prompt=5, name="c")
    assert computed(line.step()) == {"a": 9, "c": 5}
    assert computed(line.step()) == {"a": 1, "b": 1, "c": 1}


def test_a_long_shared_prompt_is_waited_for_over_its_steps_and_not_beyond() -> None:
    line = Line(prefix_cache=True)
    line.add(prompt=40, name="a")
    line.add(prompt=42, name="b")
    assert [computed(line.step()) for _ in range(4)] == [{"a": 16}, {"a": 16}, {"a": 8}, {"a": 1, "b": 2}]


def test_nobody_waits_for_a_prompt_that_has_gone() -> None:
    line = Line(prefix_cache=True)
    first = line.add(prompt=40, name="a")
    line.add(prompt=40, name="b")
    line.step()
    line.scheduler.end(first)
    # What a left in the cache is used all the same.
    assert computed(line.step()) == {"b": 16}
    assert line.scheduler.running[0].computed == 32


def test_a_request_that_wants_no_cached_tokens_waits_for_nobody() -> None:
    line = Line(prefix_cache=True, step_tokens=32)
    line.add(prompt=9, name="a")
    line.add(prompt=9, name="b", reuse_prefix=False)
    assert computed(line.step()) == {"a": 9, "b": 9}


@settings(max_examples=60, deadline=None)
@given(
    arrivals=arrivals,
    slots=st.integers(1, 3),
    limit=st.integers(0, 2),
    overtakes=st.integers(0, 6),
    kv_tokens=st.sampled_from([32, 64, 256]),
    late=st.dictionaries(st.sampled_from(["d0", "d1", "d2"]), st.integers(0, 40)),
    shared=st.booleans(),
)
def test_every_request_ends(
    arrivals: list[Any],
    slots: int,
    limit: int,
    overtakes: int,
    kv_tokens: int,
    late: dict[str, int],
    shared: bool,
) -> None:
    line = Line(
        slots,
        late,
        max_step_adapters=limit,
        max_overtakes=overtakes,
        kv_tokens=kv_tokens,
        # All prompts are of one token again and again, so that those of one tenant and adapter share blocks.
        prefix_cache=shared,
    )
    for pause, tenant, digest, prompt, output, priority in arrivals:
        for _ in range(pause):
            line.step()
        line.add(tenant, digest, prompt, output, priority)
    line.run()
    assert len(line.ended) == len(set(line.ended)) == len(arrivals)
    assert line.most_adapters <= min(slots, limit or slots)
    assert (line.blocks.used, sum(line.placer.uses.values())) == (0, 0)
    assert (line.scheduler.waiting.tokens, len(line.scheduler.waiting.tenants)) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    flood=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=60, max_size=60),
    small=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=10, max_size=20),
    head_start=st.integers(0, 40),
)
def test_counters_of_backlogged_tenants_stay_within_the_bound_of_the_paper(
    flood: list[tuple[int, int]], small: list[tuple[int, int]], head_start: int
) -> None:
    """Lemma 4.3 of arXiv:2401.00588, for a batch of at most 4 rows.

    A prompt may be half charged when the next request is weighed: the sum where the paper has the larger.
    """
    line = Line()
    bound = 1.0 * 30 + 2.0 * 4 * 12
    for prompt, output in flood:
        line.add("flood", None, prompt, output)
    for _ in range(head_start):
        line.step()
    for prompt, output in small:
        line.add("small", None, prompt, output)
    while {"flood", "small"} <= set(line.scheduler.waiting.tenants):
        line.step()
        assert abs(line.counter("flood") - line.counter("small")) <= bound


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.lists(st.integers(1, 12), min_size=20, max_size=60),
    head_start=st.integers(0, 10),
)
def test_a_flood_delays_another_tenants_request_by_a_bounded_number_of_tokens(
    outputs: list[int], head_start: int
) -> None:
    line = Line()
    for output in outputs:
        line.add("flood", None, 4, output)
    for _ in range(head_start):
        line.step()
    before = line.counter("flood")
    one = line.add("small", None, 4, 2)
    while one.state is SequenceState.WAITING:
        line.step()
    # At most what runs already, and one request of a tenant that was at the same level.
    assert line.counter("flood") - before <= 4.0 + 2.0 * 4 * 12


@pytest.mark.parametrize(
    "values",
    [
        {"priority_overtakes": 0},
        {"tenant_counters": 0},
        {"max_step_adapters": -1},
        {"prompt_token_weight": 0.0},
        {"output_token_weight": float("inf")},
    ],
)
def test_bad_limits_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(MeshError):
        EngineConfig(disk_dir=Path(), **values)
