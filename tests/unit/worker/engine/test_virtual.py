"""Adapters that put virtual tokens in front of every prompt: computed ones, and ones with given keys."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.admission import check_adapter
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.prefix_cache import BlockKeys
from adaptermesh.worker.engine.request import FinishReason
from adaptermesh.worker.engine.traits import Traits
from tests.unit.worker.engine.conftest import LAYERS
from tests.unit.worker.engine.test_graphs import Graphed
from tests.unit.worker.engine.test_logprobs import assert_scored
from tests.unit.worker.engine.test_prefix_cache import (
    answer_as_from_an_empty_cache,
    ask,
    cached_tokens,
    count_computed,
)

KINDS = ["prompt", "prefix"]
PROMPT = [(7 * place) % 250 for place in range(20)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_how_many_there_are(lab: Any, kind: str) -> None:
    traits = Traits.of(lab.virtual(kind, 1, 11).manifest)
    assert traits == Traits(virtual=11, given=11 if kind == "prefix" else 0)
    assert Traits.of(lab.adapter(1).manifest) == Traits()


# Answers.


@pytest.mark.parametrize("forward", ["auto", "lean", "plain"])
@pytest.mark.parametrize("step_tokens", [16, 64])
def test_answers_are_those_of_peft_whoever_else_is_in_the_batch(
    lab: Any, make_bench: Any, forward: str, step_tokens: int
) -> None:
    bench = make_bench(forward=forward, step_tokens=step_tokens)
    asked = [
        (lab.virtual("prompt", 1, 11), PROMPT),
        (lab.virtual("prefix", 2, 11), PROMPT),
        (None, PROMPT),
        (lab.virtual("prefix", 3, 16), PROMPT[:1]),
        (lab.virtual("prompt", 4, 16), PROMPT[:1]),
        (lab.adapter(2), PROMPT),
        (lab.virtual("prompt", 5, 40), PROMPT[:9]),
        (lab.virtual("prefix", 6, 40), PROMPT[:9]),
        (lab.virtual("prefix", 2, 11), PROMPT[:5]),
        (lab.virtual("prompt", 7, 1), PROMPT),
    ]
    heard = [bench.submit(adapter, prompt, 6) for adapter, prompt in asked]
    bench.run(*heard)
    for (adapter, prompt), one in zip(asked, heard, strict=True):
        assert one.error is None
        assert one.tokens == lab.continuation(adapter, prompt, 6)
        assert one.tokens != lab.continuation(None, prompt, 6) or adapter is None
        assert one.outcome
        assert (one.outcome.prompt_tokens, one.outcome.output_tokens) == (len(prompt), 6)
    bench.assert_empty()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_counts_them_but_the_cache(lab: Any, make_bench: Any, kind: str) -> None:
    bench = make_bench(block_tokens=8)
    adapter = lab.virtual(kind, 1, 11)
    heard = bench.submit(adapter, [5, 6, 7], 4, repetition_penalty=1.5, logprobs=0)
    [row] = bench.engine._rows.values()
    while not heard.tokens:
        bench.engine.step()
    assert (row.virtual, row.length, row.prompt_tokens) == (11, 15, 3)
    assert row.history.catch_up(row.tokens).counts.keys() == {5, 6, 7, *heard.tokens}
    assert bench.engine.status().kv_used_tokens == 16
    bench.run(heard)
    assert len(heard.tokens) == len(heard.logprobs) == heard.outcome.output_tokens == 4
    assert heard.text == bench.base.decode(heard.tokens)
    assert heard.outcome.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_tokens", [16, 64])
def test_prompts_are_scored_as_peft_scores_them(
    lab: Any, make_bench: Any, kind: str, step_tokens: int
) -> None:
    bench = make_bench(step_tokens=step_tokens, scored_tokens=7)
    adapter = lab.virtual(kind, 1, 19)
    bench.run(bench.submit(adapter, PROMPT, 1))
    heard = bench.submit(adapter, PROMPT, 2, prompt_logprobs=3)
    bench.run(heard)
    assert_scored(lab, adapter, PROMPT, heard.prompt_logprobs, 3)


def test_steps_of_decodes_are_recorded(lab: Any, make_bench: Any) -> None:
    graphed = Graphed(make_bench)
    prompt, prefix = lab.virtual("prompt", 1, 11), lab.virtual("prefix", 2, 11)
    graphed.load(lab, prompt, prefix, lab.adapter(2))
    graphed.run(lab, [(prompt, PROMPT), (prefix, PROMPT[:3])])
    assert {key.rank for key in graphed.keys} == {0}, "what is left of them is in the cache"
    graphed.run(lab, [(prompt, PROMPT), (prefix, PROMPT[:3]), (lab.adapter(2), PROMPT)])
    assert graphed.recorder.replayed


# The cache.


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_of_virtual_tokens_are_shared_and_never_written_again(
    lab: Any, make_bench: Any, kind: str
) -> None:
    bench = make_bench(block_tokens=8)
    adapter = lab.virtual(kind, 1, 19)
    first = ask(bench, adapter, [1, 2, 3], 30)
    bench.engine.step()
    bench.engine.step()
    [row] = bench.engine._scheduler.running
    shared = row.table.blocks[:2]
    cache = bench.engine._runner._cache
    before = cache.data[:, shared].clone()
    computed = count_computed(bench)
    second = ask(bench, adapter, [4, 5, 6, 7], 3)
    bench.engine.step()
    assert bench.engine._scheduler.running[1].table.blocks[:2] == shared
    assert computed == [1 + 4 + (3 if kind == "prompt" else 0)], "what is behind the last whole block"
    assert torch.equal(cache.data[:, shared], before)
    bench.run(first, second)
    assert first.tokens == lab.continuation(adapter, [1, 2, 3], 30)
    assert second.tokens == lab.continuation(adapter, [4, 5, 6, 7], 3)
    assert second.outcome
    assert second.outcome.timeline.cached_tokens == 0, "none of the prompt's"


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_behind_them_are_found_by_their_own_tenant_and_adapter(
    lab: Any, make_bench: Any, kind: str
) -> None:
    bench = make_bench(block_tokens=8)
    adapter = lab.virtual(kind, 1, 11)
    bench.run(ask(bench, adapter, PROMPT))
    # 31 tokens, three whole blocks, of which 13 tokens are the prompt's.
    assert cached_tokens(bench, adapter, PROMPT) == 13
    assert cached_tokens(bench, adapter, [*PROMPT[:6], 9, 9, 9]) == 5
    assert cached_tokens(bench, adapter, PROMPT, tenant="another") == 0
    assert cached_tokens(bench, lab.virtual(kind, 2, 11), PROMPT) == 0
    assert cached_tokens(bench, None, PROMPT) == 0


def test_keys_know_where_the_prompt_begins() -> None:
    def keys(virtual: int, tokens: list[int], blocks: int) -> list[bytes]:
        return BlockKeys("d", "t", 0, virtual).first(blocks, tokens, 4)

    assert keys(6, [1, 2, 3], 2)[:1] == keys(6, [9], 1)
    assert keys(6, [1, 2, 3], 2) == keys(6, [1, 2, 8], 2)
    assert keys(6, [1, 2], 2) != keys(6, [1, 3], 2)
    assert keys(6, [1, 2], 2)[1] != keys(7, [1], 2)[1]
    assert keys(0, [1, 2, 3, 4], 1) == BlockKeys("d", "t").first(1, [1, 2, 3, 4], 4)
    assert keys(8, [], 2) == keys(8, [1, 2, 3, 4], 3)[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_gave_way_goes_on_as_it_was(lab: Any, make_bench: Any, kind: str) -> None:
    for prefix_cache in (True, False):
        bench = make_bench(kv_tokens=96, step_tokens=16, prefix_cache=prefix_cache)
        asked = [(lab.virtual(kind, 1, 11), PROMPT), (None, PROMPT), (lab.virtual(kind, 2, 16), PROMPT[:8])]
        heard = [bench.submit(adapter, prompt, 24) for adapter, prompt in asked]
        bench.run(*heard)
        for one, (adapter, prompt) in zip(heard, asked, strict=True):
            assert one.tokens == lab.continuation(adapter, prompt, 24)
        bench.engine.stop()


@pytest.fixture(scope="session")
def short(lab: Any) -> dict[str, Any]:
    return {
        "base": None,
        "prompt": lab.virtual("prompt", 1, 11),
        "prefix": lab.virtual("prefix", 2, 11),
        "whole": lab.virtual("prefix", 3, 8),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["base", "prompt", "prefix", "whole"]),
            st.lists(st.integers(0, 1), min_size=1, max_size=30),
        ),
        min_size=2,
        max_size=6,
    )
)
def test_whatever_was_asked_before_the_answer_is_that_of_an_empty_cache(
    make_bench: Any, short: dict[str, Any], asked: list[tuple[str, list[int]]]
) -> None:
    bench = make_bench(kv_tokens=256, step_tokens=32)
    answer_as_from_an_empty_cache(bench, [(short[name], prompt) for name, prompt in asked])
    bench.engine.stop()


def test_the_layout_with_heads_apart_holds_the_same() -> None:
    shape = KvShape(layers=2, kv_heads=2, head_dim=3, blocks=3, block_tokens=4)
    cache = KvCache(shape, torch.float32, torch.device("cpu"))
    kv, places = torch.randn(5, 4, 3), torch.tensor([5, 6, 7, 12, 13])
    cache.write_apart(1, places, kv)
    assert not cache.data[0].any()
    flat = cache.data[1].view(5, 2, 2, 12)
    for token, place in enumerate(places.tolist()):
        keys, values = flat[place // 4].unbind(1)
        assert torch.equal(keys.view(2, 3, 4)[:, :, place % 4], kv[token, :2])
        assert torch.equal(values.view(2, 4, 3)[:, place % 4], kv[token, 2:])
    assert int((cache.data != 0).sum()) == kv.numel()


# On their way.


@pytest.mark.parametrize("forward", ["auto", "lean"])
def test_computed_ones_begin_while_the_adapter_arrives_and_given_ones_wait(
    lab: Any, make_bench: Any, forward: str
) -> None:
    for kind in KINDS:
        bench = make_bench(forward=forward)
        bench.source.held = True
        adapter = lab.virtual(kind, 1, 11)
        heard = ask(bench, adapter, PROMPT)
        courier = bench.courier(adapter)
        worked = []
        for layer in range(1, LAYERS + 1):
            courier.send_layers(layer)
            worked.append(bench.engine.step())
        assert any(worked) == (kind == "prompt")
        courier.finish()
        bench.run(heard)
        assert heard.tokens == lab.continuation(adapter, PROMPT, 4)
        bench.assert_empty()
        bench.engine.stop()


# The context.


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_holds_them_too(lab: Any, make_bench: Any, kind: str) -> None:
    bench = make_bench(max_context_tokens=40)
    adapter = lab.virtual(kind, 1, 11)
    heard = bench.submit(adapter, PROMPT, 30)
    bench.run(heard)
    assert heard.outcome
    assert heard.outcome.finish_reason is FinishReason.LENGTH
    assert len(heard.tokens) == 40 - 11 - 20
    assert heard.tokens == lab.continuation(adapter, PROMPT, 9)
    bench.run(bench.submit(adapter, PROMPT[:1] * 28, 5))
    with pytest.raises(MeshError, match="29 tokens and the adapter puts 11 in front of it") as caught:
        bench.submit(adapter, PROMPT[:1] * 29, 5)
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG)
    bench.assert_empty()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_turns_out_to_be_too_long_is_refused_when_the_manifest_comes(
    lab: Any, make_bench: Any, kind: str
) -> None:
    bench = make_bench(max_context_tokens=40)
    bench.source.held = True
    adapter = lab.virtual(kind, 1, 11)
    long, short = bench.submit(adapter, PROMPT[:1] * 29, 5), bench.submit(adapter, PROMPT[:1] * 28, 5)
    bench.engine.step()
    bench.source.release()
    bench.run(long, short)
    assert long.error is not None
    assert long.error.reason is Reason.PROMPT_TOO_LONG
    assert "puts 11 in front of it" in long.error.message
    assert short.error is None
    assert len(short.tokens) == 1
    bench.assert_empty()


@pytest.mark.parametrize(
    ("kind", "shape"), [("prompt", (11, 32)), ("prefix", (1, 11, 16)), ("prefix", (2, 11, 8))]
)
def test_a_manifest_of_other_widths_is_refused(
    lab: Any, make_bench: Any, kind: str, shape: tuple[int, ...]
) -> None:
    bench, adapter = make_bench(), lab.virtual(kind, 1, 11)
    manifest: Manifest = adapter.manifest
    check_adapter(adapter.digest, manifest, bench.base)
    changed = tuple(dataclasses.replace(tensor, shape=shape) for tensor in manifest.tensors)
    with pytest.raises(MeshError, match=f"of {manifest.modules[0].op} in layer 0 is not") as caught:
        check_adapter(adapter.digest, dataclasses.replace(manifest, tensors=changed), bench.base)
    assert caught.value.reason is Reason.DATA_CORRUPT
