"""Blocks and the paged cache."""

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.worker.engine.attention import Span, plan_attention
from adaptermesh.worker.engine.kv import PADDING_BLOCK, BlockAllocator, BlockTable, KvCache, KvShape
from adaptermesh.worker.engine.prefix_cache import BlockKeys
from adaptermesh.worker.engine.ranges import RangeAllocator


def test_a_table_grows_by_whole_blocks_or_not_at_all() -> None:
    blocks, table, other = BlockAllocator(4, 8), BlockTable(), BlockTable()
    assert blocks.grow(table, 9)
    assert (len(table.blocks), blocks.free, blocks.used) == (2, 2, 2)
    assert blocks.grow(table, 16)
    assert len(table.blocks) == 2
    assert not blocks.grow(other, 17)
    assert other.blocks == []
    assert blocks.grow(other, 16)
    blocks.release(table)
    assert (blocks.free, table.blocks) == (2, [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=40))
def test_no_block_is_given_out_twice(actions: list[tuple[int, int]]) -> None:
    blocks, tables = BlockAllocator(10, 4), [BlockTable() for _ in range(4)]
    for index, tokens in actions:
        if tokens == 0:
            blocks.release(tables[index])
        else:
            blocks.grow(tables[index], tokens)
        held = [block for table in tables for block in table.blocks]
        assert len(held) == len(set(held)) == blocks.used
        assert PADDING_BLOCK not in held
        assert blocks.free + blocks.used == 10


def test_a_block_is_dirty_once_each_time_it_is_given_out() -> None:
    blocks, table = BlockAllocator(4, 8), BlockTable()
    blocks.grow(table, 10)
    assert sorted(blocks.take_dirty()) == sorted(table.blocks)
    assert blocks.take_dirty() == []


@dataclass
class PlainSequence:
    """What a sequence is to its blocks. `tenant` stands for all that a key starts with."""

    tenant: str
    tokens: list[int]
    keys: BlockKeys
    table: BlockTable = field(default_factory=BlockTable)
    computed: int = 0


class PlainTwin:
    """The allocator written down plainly: whole prefixes for keys, lists that are searched from end to end.

    `memory` plays the tensor: at each place of a block, the owner and all tokens up to there.
    """

    SIZE = 2

    def __init__(self, blocks: int) -> None:
        self.real = BlockAllocator(blocks, self.SIZE)
        self.memory: dict[int, list[object]] = {
            block: ["rubbish"] * self.SIZE for block in range(1, blocks + 1)
        }
        self.known: list[tuple[object, int]] = []
        self.resting: list[int] = []
        self.sequences: list[PlainSequence] = []

    def holders(self, block: int) -> int:
        return sum(sequence.table.blocks.count(block) for sequence in self.sequences)

    def block_of(self, sequence: PlainSequence, index: int) -> int | None:
        prefix = (sequence.tenant, tuple(sequence.tokens[: (index + 1) * self.SIZE]))
        return next((block for known, block in self.known if known == prefix), None)

    def keys(self, sequence: PlainSequence, count: int) -> list[bytes]:
        return sequence.keys.first(count, sequence.tokens, self.SIZE)

    def start(self, tenant: str, tokens: list[int]) -> None:
        sequence = PlainSequence(tenant, tokens, BlockKeys(None, tenant))
        expected: list[int] = []
        while len(expected) < (len(tokens) - 1) // self.SIZE:
            block = self.block_of(sequence, len(expected))
            if block is None:
                break
            expected.append(block)
        need = -(-len(tokens) // self.SIZE) - len(expected)
        keys = self.keys(sequence, (len(tokens) - 1) // self.SIZE)
        fresh = self.real.free - sum(block in self.resting for block in expected)
        assert self.real.has_room(len(tokens), keys) == (need <= fresh)
        sequence.computed = self.real.share(sequence.table, keys)
        assert sequence.table.blocks == expected
        assert sequence.computed == len(expected) * self.SIZE
        self.resting = [block for block in self.resting if block not in expected]
        self.sequences.append(sequence)
        assert self.real.grow(sequence.table, len(tokens)) == (need <= fresh)
        if need > fresh:
            self.end(sequence)
            return
        self.settle_grown(sequence, len(expected))

    def settle_grown(self, sequence: PlainSequence, held: int) -> None:
        """Blocks given out anew: uncached ones first, then those that have rested longest."""
        for block in sequence.table.blocks[held:]:
            assert self.holders(block) == 1
            if block in self.resting:
                assert self.resting.pop(0) == block
                self.known = [(prefix, other) for prefix, other in self.known if other != block]
            else:
                assert all(other != block for _, other in self.known)
        dirty = self.real.take_dirty()
        assert dirty == sequence.table.blocks[held:]
        for block in dirty:
            self.memory[block] = [None] * self.SIZE

    def compute(self, sequence: PlainSequence, count: int) -> None:
        for place in range(sequence.computed, min(sequence.computed + count, len(sequence.tokens))):
            block = sequence.table.blocks[place // self.SIZE]
            assert self.holders(block) == 1, "a shared block is never written"
            self.memory[block][place % self.SIZE] = (sequence.tenant, tuple(sequence.tokens[: place + 1]))
            sequence.computed = place + 1
        full = sequence.computed // self.SIZE
        for index in range(full):
            block = sequence.table.blocks[index]
            if self.block_of(sequence, index) is None and all(other != block for _, other in self.known):
                prefix = (sequence.tenant, tuple(sequence.tokens[: (index + 1) * self.SIZE]))
                self.known.append((prefix, block))
        self.real.keep(sequence.table, self.keys(sequence, full))

    def extend(self, sequence: PlainSequence, token: int) -> None:
        held = len(sequence.table.blocks)
        if self.real.grow(sequence.table, len(sequence.tokens) + 1):
            sequence.tokens.append(token)
            self.settle_grown(sequence, held)

    def end(self, sequence: PlainSequence) -> None:
        blocks = list(sequence.table.blocks)
        self.real.release(sequence.table)
        self.sequences.remove(sequence)
        for block in reversed(blocks):
            if self.holders(block) == 0 and any(other == block for _, other in self.known):
                self.resting.append(block)

    def check(self) -> None:
        held = {block for sequence in self.sequences for block in sequence.table.blocks}
        assert PADDING_BLOCK not in held
        assert self.real.used == len(held)
        assert self.real.free + self.real.used == self.real.total
        assert self.real.reclaimable == len(self.resting)
        for sequence in self.sequences:
            assert len(sequence.table.blocks) == len(set(sequence.table.blocks))
            for place in range(sequence.computed):
                found = self.memory[sequence.table.blocks[place // self.SIZE]][place % self.SIZE]
                assert found == (sequence.tenant, tuple(sequence.tokens[: place + 1]))


EVENTS = st.one_of(
    st.tuples(st.just("start"), st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=9)),
    st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.just("extend"), st.integers(0, 9), st.integers(0, 1)),
    st.tuples(st.just("end"), st.integers(0, 9), st.none()),
)


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_shared_blocks_follow_the_plain_twin(events: list[tuple[str, object, object]]) -> None:
    twin = PlainTwin(9)
    for kind, first, second in events:
        if kind == "start":
            assert isinstance(first, str)
            assert isinstance(second, list)
            twin.start(first, list(second))
        elif twin.sequences:
            assert isinstance(first, int)
            sequence = twin.sequences[first % len(twin.sequences)]
            if kind == "end":
                twin.end(sequence)
            else:
                assert isinstance(second, int)
                (twin.compute if kind == "compute" else twin.extend)(sequence, second)
        twin.check()
    for sequence in list(twin.sequences):
        twin.end(sequence)
    assert twin.real.free == 9, "no block is lost"
    table = BlockTable()
    assert twin.real.grow(table, 18)
    assert sorted(table.blocks) == list(range(1, 10))
    assert twin.real.reclaimable == 0


def test_blocks_that_nobody_can_find_again_are_given_out_before_cached_ones() -> None:
    blocks, cached, uncached = BlockAllocator(4, 2), BlockTable(), BlockTable()
    keys = BlockKeys(None, "acme").first(2, [1, 2, 3, 4], 2)
    blocks.grow(cached, 4)
    blocks.keep(cached, keys)
    blocks.grow(uncached, 4)
    first, last = cached.blocks
    expected = sorted(uncached.blocks)
    blocks.release(cached)
    blocks.release(uncached)
    table = BlockTable()
    blocks.grow(table, 4)
    assert sorted(table.blocks) == expected
    blocks.grow(table, 8)
    assert table.blocks[2:] == [last, first], "the end of a chain goes before its start"


def test_a_resting_block_is_not_both_shared_and_given_out() -> None:
    blocks, cached, running = BlockAllocator(4, 2), BlockTable(), BlockTable()
    keys = BlockKeys(None, "acme").first(2, [1, 2, 3, 4], 2)
    blocks.grow(cached, 4)
    blocks.keep(cached, keys)
    blocks.grow(running, 2)
    blocks.release(cached)
    assert blocks.free == 3
    assert blocks.has_room(6, keys)
    assert not blocks.has_room(7, keys)
    assert not blocks.has_room(7, [])
    blocks.share(cached, keys)
    assert blocks.free == 1
    assert blocks.has_room(6, keys)
    assert not blocks.has_room(3, [])


def test_what_a_former_owner_left_does_not_reach_the_next_one() -> None:
    cache = KvCache(KvShape(1, 1, 4, 2, 4), torch.float32, torch.device("cpu"))
    cache.data[:, 1] = float("inf")
    cache.zero([1])
    plan = plan_attention([Span(0, 1, (1,))], 1, 4, torch.float32, torch.device("cpu"))
    out = plan.attend(cache, 0, torch.ones(1, 2, 4), torch.ones(1, 2, 4), 0.5)
    torch.testing.assert_close(out, torch.ones(1, 8))


def attend_plainly(
    q: torch.Tensor, kv: torch.Tensor, past: int, scaling: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """q: [new, heads, d]; kv: [past + new, 2 * kv_heads, d]; one sequence."""
    kv_heads = kv.shape[1] // 2
    groups = q.shape[1] // kv_heads
    keys = kv[:, :kv_heads].repeat_interleave(groups, 1)
    values = kv[:, kv_heads:].repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    ages = torch.arange(past, kv.shape[0])[:, None] - torch.arange(kv.shape[0])[None, :]
    hidden = (ages < 0) | (ages >= (kv.shape[0] if window is None else window))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.just(1)), max_size=4),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=3),
    st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=3),
    st.none() | st.floats(0.5, 5.0),
)
def test_packed_attention_equals_each_sequence_alone(
    decodes: list[tuple[int, int]],
    chunks: list[tuple[int, int]],
    windows: list[int | None],
    softcap: float | None,
) -> None:
    rows = decodes + chunks
    if not rows:
        return
    torch.manual_seed(0)
    cpu, size, layers = torch.device("cpu"), 8, 2
    cache = KvCache(KvShape(layers, 2, 4, 130, size), torch.float32, cpu)
    blocks = BlockAllocator(130, size)
    spans, contexts = [], []
    for past, count in rows:
        table = BlockTable()
        assert blocks.grow(table, past + count)
        table.blocks.reverse()
        context = torch.randn(past + count, 4, 4)
        places = [table.blocks[at // size] * size + at % size for at in range(past)]
        cache.write(1, torch.tensor(places, dtype=torch.int64), context[:past])
        spans.append(Span(past, count, tuple(table.blocks)))
        contexts.append(context)
    plan = plan_attention(spans, len(decodes), size, torch.float32, cpu)
    q = torch.randn(sum(count for _, count in rows), 6, 4)
    new = torch.cat([context[past:] for (past, _), context in zip(rows, contexts, strict=True)])
    for window in windows:
        out = plan.attend(cache, 1, q, new, 0.5, window=window, softcap=softcap)
        start = 0
        for (past, count), context in zip(rows, contexts, strict=True):
            expected = attend_plainly(q[start : start + count], context, past, 0.5, window, softcap)
            torch.testing.assert_close(out[start : start + count], expected, atol=1e-5, rtol=1e-5)
            start += count


def test_a_window_gathers_its_own_blocks_only_and_is_planned_once_a_step() -> None:
    spans = [Span(40, 1, tuple(range(1, 12))), Span(20, 4, tuple(range(12, 18)))]
    plan = plan_attention(spans, 1, 4, torch.float32, torch.device("cpu"))
    reach = plan.reach(6)
    chunk_blocks = reach.chunks[0].blocks
    assert reach.groups[0].blocks.tolist() == [9, 10, 11]
    assert chunk_blocks is not None
    assert chunk_blocks.tolist() == [15, 16, 17]
    assert plan.reach(6) is reach
    assert plan.reach(41) is plan.reach(None)


def test_rows_that_differ_only_outside_of_a_window_attend_together() -> None:
    spans = [Span(10, 1, tuple(range(1, 4))), Span(200, 1, tuple(range(4, 55)))]
    plan = plan_attention(spans, 2, 4, torch.float32, torch.device("cpu"))
    assert [group.count for group in plan.reach(None).groups] == [1, 1]
    assert [group.count for group in plan.reach(8).groups] == [2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_ranges_never_overlap_and_all_come_back(actions: list[tuple[bool, int]]) -> None:
    ranges = RangeAllocator()
    ranges.grow(32)
    held: list[tuple[int, int]] = []
    for take, size in actions:
        if take:
            start = ranges.take(size)
            if start is not None:
                held.append((start, size))
        elif held:
            ranges.give(*held.pop(size % len(held)))
        rows = [row for start, size in held for row in range(start, start + size)]
        assert len(rows) == len(set(rows)) == ranges.used
        assert all(0 <= row < 32 for row in rows)
    for start, size in held:
        ranges.give(start, size)
    assert ranges.take(32) == 0
