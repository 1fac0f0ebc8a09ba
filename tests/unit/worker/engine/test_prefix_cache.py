"""Computed tokens that serve again, and never for another adapter, version or tenant."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from adaptermesh.core.errors import Code
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.postprocess import StepResult
from adaptermesh.worker.engine.prefix_cache import BlockKeys
from adaptermesh.worker.engine.request import Request
from adaptermesh.worker.engine.traits import Traits
from tests.unit.worker.engine.conftest import Bench, Heard

Prompts = Callable[[int, int], list[list[int]]]

PROMPT = [(7 * place) % 250 for place in range(40)]


def ask(
    bench: Bench,
    adapter: Any,
    prompt: Sequence[int],
    max_tokens: int = 4,
    tenant: str = "tenant",
    reuse_prefix: bool = True,
    **sampling: Any,
) -> Heard:
    """As `Bench.submit`, for a tenant of the test's choice."""
    bench.count += 1
    heard = Heard()
    if adapter is not None:
        bench.source.adapters.setdefault(adapter.digest, adapter)
    request = Request(
        request_id=f"p{bench.count}",
        tenant=tenant,
        digest=adapter.digest if adapter else None,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(
            **{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
        ),
        reuse_prefix=reuse_prefix,
    )
    bench.engine.submit(request, heard)
    return heard


def answer_as_from_an_empty_cache(bench: Any, asked: Sequence[tuple[Any, list[int]]]) -> None:
    """Each answer, whatever was asked before it, is the one that takes nothing from the prefix cache."""

    def logprobs(adapter: Any, prompt: list[int], **options: Any) -> Heard:
        heard = ask(bench, adapter, prompt, 3, logprobs=3, **options)
        bench.run(heard)
        return heard

    for adapter, prompt in asked:
        expected = logprobs(adapter, prompt, reuse_prefix=False, tenant="fresh")
        found = logprobs(adapter, prompt)
        assert found.tokens == expected.tokens
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def count_computed(bench: Bench) -> list[int]:
    """The number of tokens of each step from now on."""
    counts: list[int] = []
    run = bench.engine._runner.run

    def counted(plan: Any, fresh_blocks: list[int]) -> StepResult:
        counts.append(sum(row.count for row in plan.rows))
        return run(plan, fresh_blocks)

    bench.engine._runner.run = counted  # type: ignore[method-assign]
    return counts


def cached_tokens(bench: Bench, *asked: Any, **options: Any) -> int:
    """Asks, waits for the end and says what came from the cache."""
    heard = ask(bench, *asked, **options)
    bench.run(heard)
    assert heard.outcome
    return heard.outcome.timeline.cached_tokens


def test_a_second_request_computes_only_what_the_first_did_not(lab: Any, make_bench: Any) -> None:
    bench = make_bench(block_tokens=8)
    computed = count_computed(bench)
    bench.run(ask(bench, None, PROMPT, 1))
    assert computed == [40]
    computed.clear()
    second = ask(bench, None, [*PROMPT[:30], 1, 2, 3], 1)
    bench.run(second)
    assert computed == [33 - 24], "three whole blocks are the same"
    assert second.outcome
    assert second.outcome.timeline.cached_tokens == 24
    assert second.tokens == lab.continuation(None, [*PROMPT[:30], 1, 2, 3], 1)


def test_the_last_token_of_a_prompt_is_always_computed(lab: Any, make_bench: Any) -> None:
    bench = make_bench(block_tokens=8)
    bench.run(ask(bench, None, PROMPT, 4))
    computed = count_computed(bench)
    again = ask(bench, None, PROMPT, 4)
    bench.run(again)
    assert computed == [8, 1, 1, 1], "40 tokens fill five blocks; the last one is computed anew"
    assert again.tokens == lab.continuation(None, PROMPT, 4)
    longer = ask(bench, None, [*PROMPT, 9], 4)
    computed.clear()
    bench.run(longer)
    assert computed == [1, 1, 1, 1]
    assert longer.tokens == lab.continuation(None, [*PROMPT, 9], 4)


def test_the_next_turn_of_a_conversation_finds_the_answer_too(lab: Any, make_bench: Any) -> None:
    bench = make_bench(block_tokens=8)
    adapter = lab.adapter(1, 4)
    first = ask(bench, adapter, PROMPT[:10], 15)
    bench.run(first)
    turn = [*PROMPT[:10], *first.tokens, 5, 6]
    second = ask(bench, adapter, turn, 6)
    bench.run(second)
    assert second.outcome
    assert second.outcome.timeline.cached_tokens == 24
    assert second.tokens == lab.continuation(adapter, turn, 6)


def test_keys_know_how_long_a_prompt_is_whose_ends_are_computed_otherwise() -> None:
    def keys(ends: tuple[int, int], tokens: int, prompt: int) -> list[bytes]:
        traits = Traits(ends=ends)
        seam = traits.prompt_seam(prompt)
        ending = None if seam is None else (seam, prompt)
        return BlockKeys("d", "t", ending=ending).first(tokens // 4, PROMPT[:tokens], 4)

    plain = BlockKeys("d", "t").first(5, PROMPT[:20], 4)
    assert keys((3, 0), 20, 3) == keys((3, 0), 20, 20) == plain
    # The third token may be generated, or the prompt's.
    assert keys((3, 0), 20, 2)[0] != plain[0]
    assert keys((0, 3), 20, 20)[:4] == plain[:4]
    assert keys((0, 3), 20, 20)[4] != plain[4]
    assert keys((0, 3), 20, 16)[:3] == plain[:3]
    assert not set(keys((0, 3), 20, 16)[3:]) & {*plain, *keys((0, 3), 20, 15)}
    assert keys((0, 3), 4, 2)[0] != keys((0, 3), 4, 3)[0]


def test_running_requests_share_blocks_without_a_copy(lab: Any, make_bench: Any) -> None:
    bench = make_bench(block_tokens=8)
    heard = [ask(bench, None, PROMPT, 30)]
    bench.engine.step()
    heard += [ask(bench, None, [*PROMPT, number], 20) for number in range(4)]
    bench.engine.step()
    tables = [row.table.blocks for row in bench.engine._scheduler.running]
    assert all(table[:5] == tables[0][:5] for table in tables)
    assert bench.engine._blocks.used == len({block for table in tables for block in table}) == 5 + 5
    bench.run(*heard)
    for number, one in enumerate(heard[1:]):
        assert one.tokens == lab.continuation(None, [*PROMPT, number], 20)
    assert heard[0].tokens == lab.continuation(None, PROMPT, 30)
    bench.assert_empty()


def test_equal_prompts_that_come_together_are_computed_once(lab: Any, make_bench: Any) -> None:
    bench = make_bench(block_tokens=8, step_tokens=128)
    computed = count_computed(bench)
    heard = [ask(bench, None, PROMPT, 6) for _ in range(3)]
    bench.run(*heard)
    # Then the others compute their last block, each its own, beside the first one's next token.
    assert computed[:2] == [40, 8 + 8 + 1]
    assert [one.outcome.timeline.cached_tokens for one in heard if one.outcome] == [0, 32, 32]
    assert all(one.tokens == lab.continuation(None, PROMPT, 6) for one in heard)
    assert bench.engine.status().kv_cached_tokens == 40
    bench.assert_empty()


def test_a_prefix_is_never_shared_between_adapters_or_tenants(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    other = lab.adapter(2, 8, ("q_proj", "v_proj"))
    asked = [(adapter, tenant) for adapter in (None, lab.adapter(1, 4), other) for tenant in ("a", "b")]
    for adapter, tenant in asked:
        heard = ask(bench, adapter, PROMPT, 6, tenant=tenant)
        bench.run(heard)
        assert heard.outcome
        assert heard.outcome.timeline.cached_tokens == 0
        assert heard.tokens == lab.continuation(adapter, PROMPT, 6)
    for adapter, tenant in asked:
        assert cached_tokens(bench, adapter, PROMPT, 6, tenant=tenant) == 32


def test_new_weights_under_the_same_name_never_meet_old_blocks(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    old, new = lab.adapter(1, 4), lab.adapter(1, 8)
    assert (old.manifest.namespace, old.manifest.name) == (new.manifest.namespace, new.manifest.name)
    assert old.digest != new.digest
    bench.run(ask(bench, old, PROMPT, 6))
    heard = ask(bench, new, PROMPT, 6)
    bench.run(heard)
    assert heard.outcome
    assert heard.outcome.timeline.cached_tokens == 0
    assert heard.tokens == lab.continuation(new, PROMPT, 6) != lab.continuation(old, PROMPT, 6)


def test_a_slot_that_gets_another_adapter_brings_no_blocks_along(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=1)
    adapters = [lab.adapter(1, 4), lab.adapter(4, 2, rank_pattern={"q_proj": 6})]
    for turn in range(4):
        adapter = adapters[turn % 2]
        heard = ask(bench, adapter, PROMPT, 6)
        bench.run(heard)
        assert heard.outcome
        assert heard.outcome.timeline.cached_tokens == (0 if turn < 2 else 32)
        assert heard.tokens == lab.continuation(adapter, PROMPT, 6)


@pytest.mark.parametrize(
    ("digest", "tenant", "tokens"),
    [
        (None, "acme", [1, 2, 3, 5]),
        (None, "acme", [2, 1, 3, 4]),
        (None, "globex", [1, 2, 3, 4]),
        ("sha256:aa", "acme", [1, 2, 3, 4]),
        ("base", "acme", [1, 2, 3, 4]),
        ("sha256:aa acme", "", [1, 2, 3, 4]),
    ],
)
def test_keys_differ_where_anything_before_them_does(
    digest: str | None, tenant: str, tokens: list[int]
) -> None:
    mine = BlockKeys(None, "acme").first(2, [1, 2, 3, 4], 2)
    other = BlockKeys(digest, tenant).first(2, tokens, 2)
    assert mine[1] != other[1]
    assert (mine[0] == other[0]) == (tokens == [1, 2, 3, 5])


def test_keys_are_the_same_however_they_are_asked_for() -> None:
    tokens = list(range(20))
    whole, bit_by_bit = BlockKeys("sha256:aa", "acme"), BlockKeys("sha256:aa", "acme")
    for blocks in (1, 2, 2, 0, 4):
        assert bit_by_bit.first(blocks, tokens[: 4 * max(blocks, 2)], 4) == whole.first(5, tokens, 4)[:blocks]


def test_without_the_cache_nothing_is_kept(lab: Any, make_bench: Any) -> None:
    bench = make_bench(prefix_cache=False)
    computed = count_computed(bench)
    for _ in range(2):
        heard = ask(bench, None, PROMPT, 1)
        bench.run(heard)
        assert heard.tokens == lab.continuation(None, PROMPT, 1)
    assert computed == [40, 40]
    status = bench.engine.status()
    assert (status.kv_cached_tokens, status.prefix_query_tokens, status.prefix_hit_tokens) == (0, 0, 0)


def test_a_request_that_needs_its_whole_prompt_computed_gets_that(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    computed = count_computed(bench)
    assert cached_tokens(bench, None, PROMPT, 1, reuse_prefix=False) == 0
    assert cached_tokens(bench, None, PROMPT, 1) == 32, "what it has computed serves others"
    assert cached_tokens(bench, None, PROMPT, 1, reuse_prefix=False) == 0
    assert computed == [40, 8, 40]
    assert bench.engine.status().prefix_query_tokens == 40


def test_the_status_tells_bytes_and_hits(make_bench: Any) -> None:
    bench = make_bench(kv_tokens=64, max_context_tokens=64, block_tokens=8)
    token_bytes = 3 * 2 * 2 * 16 * 4
    idle = bench.engine.status()
    assert idle.kv_total_bytes == (64 + 16) * token_bytes, "one block pads, one is scratch"
    assert (idle.kv_used_bytes, idle.kv_cached_tokens, idle.kv_cached_bytes) == (0, 0, 0)
    first = ask(bench, None, PROMPT, 9)
    bench.engine.step()
    assert bench.engine.status().kv_used_bytes == 40 * token_bytes
    bench.run(first)
    bench.run(ask(bench, None, PROMPT[:20], 1))
    status = bench.engine.status()
    assert (status.kv_used_tokens, status.kv_used_bytes, status.kv_cached_tokens) == (0, 0, 48)
    assert status.kv_cached_bytes == 48 * token_bytes
    assert (status.prefix_query_tokens, status.prefix_hit_tokens) == (60, 16)


def test_a_cached_prompt_joins_where_a_new_one_would_have_to_wait(lab: Any, make_bench: Any) -> None:
    bench = make_bench(kv_tokens=96, max_context_tokens=96, block_tokens=8)
    first = ask(bench, None, PROMPT, 24)
    for _ in range(2):
        bench.engine.step()
    stranger, alike = ask(bench, None, PROMPT[::-1] * 2, 2), ask(bench, None, [*PROMPT, 1], 2)
    bench.engine.step()
    assert bench.engine.status().running == 1, "nobody passes the one that lacks memory"
    bench.run(first, stranger, alike)
    assert stranger.tokens == lab.continuation(None, PROMPT[::-1] * 2, 2)
    first = ask(bench, None, PROMPT * 2, 12)
    bench.engine.step()
    bench.engine.step()
    alike = ask(bench, None, [*PROMPT, *PROMPT[:8], 1], 2)
    bench.engine.step()
    assert bench.engine.status().running == 2, "it shares six of its seven blocks; only one was free"
    bench.run(first, alike)
    assert alike.tokens == lab.continuation(None, [*PROMPT, *PROMPT[:8], 1], 2)
    bench.assert_empty()


def test_a_failed_step_leaves_nothing_of_itself_in_the_cache(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    run = bench.engine._runner.run

    def broken(*_: Any) -> list[int]:
        raise RuntimeError("out of luck")

    bench.engine._runner.run = broken
    failed = ask(bench, None, PROMPT, 4)
    bench.run(failed)
    assert failed.error
    bench.engine._runner.run = run
    assert bench.engine.status().kv_cached_tokens == 0
    heard = ask(bench, None, PROMPT, 4)
    bench.run(heard)
    assert heard.outcome
    assert heard.outcome.timeline.cached_tokens == 0
    assert heard.tokens == lab.continuation(None, PROMPT, 4)


def test_a_preempted_request_comes_back_to_its_own_blocks(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    computed = count_computed(bench)
    adapter = lab.adapter(1, 4)
    heard = ask(bench, adapter, PROMPT[:20], 20)
    for _ in range(6):
        bench.engine.step()
    [sequence] = bench.engine._scheduler.running
    bench.engine._scheduler._preempt(sequence)
    assert bench.engine.status().kv_used_tokens == 0
    computed.clear()
    bench.run(heard)
    assert computed[0] == 26 - 24
    assert heard.tokens == lab.continuation(adapter, PROMPT[:20], 20)
    assert heard.outcome
    assert heard.outcome.timeline.cached_tokens == 0, "its own tokens are no hit"
    assert bench.engine.status().prefix_hit_tokens == 0
    bench.assert_empty()


def count_calls(owner: Any, name: str) -> list[Any]:
    """What a method has returned from now on."""
    inner = getattr(owner, name)
    returned: list[Any] = []

    def counted(*arguments: Any) -> Any:
        returned.append(inner(*arguments))
        return returned[-1]

    setattr(owner, name, counted)
    return returned


def churn(bench: Bench, adapters: Sequence[Any], prompts: Prompts) -> list[tuple[Any, list[int], Heard]]:
    """Requests that begin alike, at random times, some cancelled; two thirds greedy, the others seeded."""
    generator = torch.Generator().manual_seed(5)

    def pick(count: int) -> int:
        return int(torch.randint(0, count, (1,), generator=generator))

    starts, ends = [PROMPT[:length] for length in (0, 9, 24, 40)], prompts(4, 6)
    asked: list[tuple[Any, list[int], Heard]] = []
    for _ in range(90):
        adapter = adapters[pick(len(adapters))]
        prompt = [*starts[pick(4)], *ends[pick(4)][:20]]
        seeded = pick(3) == 0
        sampling: dict[str, Any] = {"temperature": 0.8, "seed": 11} if seeded else {}
        tenant = "ab"[pick(2)]
        asked.append((adapter, prompt, ask(bench, adapter, prompt, 1 + pick(20), tenant, **sampling)))
        if pick(8) == 0:
            bench.engine.cancel(f"p{1 + pick(bench.count)}")
        for _ in range(pick(6)):
            bench.engine.step()
    bench.run(*(heard for *_, heard in asked))
    return asked


def test_churn_answers_the_same_with_and_without_the_cache(
    lab: Any, make_bench: Any, prompts: Prompts
) -> None:
    adapters = [None, lab.adapter(1, 4), lab.adapter(1, 8)]
    small = {"kv_tokens": 160, "max_context_tokens": 96, "max_batch_rows": 6, "step_tokens": 32}
    cached, plain = (make_bench(prefix_cache=on, **small) for on in (True, False))
    preempted = count_calls(cached.engine._scheduler, "_preempt")
    reclaimed = count_calls(cached.engine._blocks._cache, "reclaim")
    found = churn(cached, adapters, prompts)
    expected = churn(plain, adapters, prompts)
    for (_, _, mine), (_, _, other) in zip(found, expected, strict=True):
        # A cancellation may come earlier or later in one of them.
        count = min(len(mine.tokens), len(other.tokens))
        assert mine.tokens[:count] == other.tokens[:count]
        for heard in (mine, other):
            assert heard.outcome or (heard.error and heard.error.code is Code.CANCELLED)
    assert sum(heard.outcome is not None for *_, heard in found) > 60
    assert cached.engine.status().prefix_hit_tokens > 200
    assert preempted
    assert len(reclaimed) > 50
    cached.assert_empty()
    plain.assert_empty()
