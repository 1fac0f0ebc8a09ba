"""Adapters that are activated by tokens of the prompt, and what they share with the base before that."""

import functools
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.ops.op import Segment
from adaptermesh.worker.engine.prefix_cache import BlockKeys
from adaptermesh.worker.engine.request import Request, Timeline
from adaptermesh.worker.engine.runner import _segments
from adaptermesh.worker.engine.sequence import Sequence as Row
from adaptermesh.worker.engine.step_plan import Row as PlanRow
from adaptermesh.worker.engine.step_plan import StepPlan
from adaptermesh.worker.engine.text import TextStream
from adaptermesh.worker.engine.traits import NEVER, Traits
from tests.unit.worker.engine.conftest import LAYERS
from tests.unit.worker.engine.test_graphs import Graphed
from tests.unit.worker.engine.test_logprobs import assert_scored
from tests.unit.worker.engine.test_prefix_cache import (
    answer_as_from_an_empty_cache,
    ask,
    cached_tokens,
    count_computed,
)

INVOCATION = [256, 258, 256]
BEFORE = [(7 * place) % 250 for place in range(28)]
PROMPT = [*BEFORE, *INVOCATION, 4, 5, 6]
"""Invoked in the fourth of its blocks of eight tokens."""
SOME = st.integers(0, 2)


@pytest.fixture(scope="session")
def alora(lab: Any) -> Any:
    return lab.alora(1, INVOCATION)


# Where it begins.


@settings(max_examples=300, deadline=None)
@given(st.lists(SOME, min_size=1, max_size=4), st.lists(SOME, min_size=1, max_size=20))
def test_the_activation_is_where_peft_finds_it(invocation: list[int], prompt: list[int]) -> None:
    config: Any = {"a": peft.LoraConfig(alora_invocation_tokens=invocation, task_type="CAUSAL_LM")}
    [offset] = calculate_alora_offsets(config, "a", torch.tensor([prompt]))
    expected = NEVER if offset is None else len(prompt) - offset
    assert Traits(tuple(invocation)).activation(prompt) == expected
    assert Traits().activation(prompt) == 0


def make_row(digest: str | None, prompt: Sequence[int], slot: int, computed: int, traits: Traits) -> Row:
    params = SamplingParams()
    request = Request("r", "t", digest, tuple(prompt), params)
    text = TextStream(lambda _: "", ())
    row = Row(request, None, list(prompt), 100, 0, text, Timeline(), 0)  # type: ignore[arg-type]
    if digest is not None:
        row.learn(traits)
    row.slot, row.computed = slot, computed
    return row


def segments(decodes: list[PlanRow], prefills: list[PlanRow]) -> list[tuple[int, int, int]]:
    found = _segments(StepPlan(tuple(decodes), tuple(prefills)))
    assert all(isinstance(one, Segment) for one in found)
    return [(one.slot, one.start, one.end) for one in found]


def test_a_chunk_across_the_activation_makes_two_segments() -> None:
    base = make_row(None, range(9), -1, 0, Traits())
    activated = Traits((7, 8))
    make = functools.partial(make_row, "d", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 3, traits=activated)
    assert segments([], [PlanRow(make(computed=0), 4)]) == [(-1, 0, 4)]
    assert segments([], [PlanRow(make(computed=0), 6)]) == [(-1, 0, 6)]
    assert segments([], [PlanRow(make(computed=0), 7)]) == [(-1, 0, 6), (3, 6, 7)]
    assert segments([], [PlanRow(make(computed=4), 6)]) == [(-1, 0, 2), (3, 2, 6)]
    assert segments([], [PlanRow(make(computed=6), 4)]) == [(3, 0, 4)]
    assert segments([PlanRow(make(computed=9), 1)], [PlanRow(make(computed=0), 8)]) == [
        (3, 0, 1),
        (-1, 1, 7),
        (3, 7, 9),
    ]
    # The base's tokens in front are one segment with what comes before them.
    rows = [PlanRow(base, 9), PlanRow(make(computed=0), 8), PlanRow(make(computed=5), 5)]
    assert segments([], rows) == [(-1, 0, 15), (3, 15, 17), (-1, 17, 18), (3, 18, 22)]


def test_a_prompt_without_the_invocation_is_the_bases_and_so_is_its_answer(
    lab: Any, make_bench: Any, alora: Any
) -> None:
    row = make_row("d", [1, 2, 3], 3, 2, Traits((7, 8)))
    assert segments([PlanRow(row, 1)], []) == [(-1, 0, 1)]
    bench = make_bench()
    heard = bench.submit(alora, BEFORE, 6)
    bench.run(heard)
    assert heard.tokens == lab.continuation(alora, BEFORE, 6) == lab.continuation(None, BEFORE, 6)


@pytest.mark.parametrize("forward", ["auto", "lean", "plain"])
@pytest.mark.parametrize("step_tokens", [16, 64])
def test_answers_are_those_of_peft(
    lab: Any, make_bench: Any, alora: Any, forward: str, step_tokens: int
) -> None:
    bench = make_bench(forward=forward, step_tokens=step_tokens)
    other, again = lab.adapter(2), [*PROMPT, 9, *INVOCATION, 8]
    asked = [(alora, PROMPT), (None, PROMPT), (alora, again), (other, PROMPT), (alora, INVOCATION)]
    heard = [bench.submit(adapter, prompt, 6) for adapter, prompt in asked]
    bench.run(*heard)
    for (adapter, prompt), one in zip(asked, heard, strict=True):
        assert one.tokens == lab.continuation(adapter, prompt, 6)
    assert heard[0].tokens != heard[1].tokens
    bench.assert_empty()


def test_prompts_are_scored_as_peft_scores_them(lab: Any, make_bench: Any, alora: Any) -> None:
    bench = make_bench(step_tokens=16)
    bench.run(bench.submit(None, PROMPT, 1))
    heard = bench.submit(alora, PROMPT, 2, prompt_logprobs=3)
    bench.run(heard)
    assert_scored(lab, alora, PROMPT, heard.prompt_logprobs, 3)


def test_recorded_steps_know_who_is_not_activated(lab: Any, make_bench: Any, alora: Any) -> None:
    graphed = Graphed(make_bench)
    graphed.load(lab, alora, lab.adapter(2))
    graphed.run(lab, [(alora, PROMPT), (alora, BEFORE), (lab.adapter(2), PROMPT)])
    assert graphed.recorder.replayed


# What is shared.


def test_blocks_before_the_activation_are_shared_with_the_base_both_ways(
    lab: Any, make_bench: Any, alora: Any
) -> None:
    for first, second in ((None, alora), (alora, None)):
        bench = make_bench()
        assert cached_tokens(bench, first, PROMPT) == 0
        computed = count_computed(bench)
        heard = ask(bench, second, PROMPT)
        bench.run(heard)
        assert heard.outcome
        assert heard.outcome.timeline.cached_tokens == 24, "the fourth block has the invocation"
        assert computed[0] == len(PROMPT) - 24
        assert heard.tokens == lab.continuation(second, PROMPT, 4)
        bench.engine.stop()


def test_blocks_behind_the_activation_are_the_adapters_alone(lab: Any, make_bench: Any, alora: Any) -> None:
    bench, longer = make_bench(), [*PROMPT, *BEFORE]
    bench.run(ask(bench, alora, longer))
    assert cached_tokens(bench, alora, longer) == 56
    assert cached_tokens(bench, lab.alora(2, INVOCATION), longer) == 24
    assert cached_tokens(bench, lab.adapter(2), longer) == 0
    assert cached_tokens(bench, None, longer) == 24
    assert cached_tokens(bench, alora, longer, tenant="another") == 0


def test_a_later_invocation_makes_the_earlier_one_the_bases(lab: Any, make_bench: Any, alora: Any) -> None:
    bench = make_bench()
    bench.run(ask(bench, alora, PROMPT, 20))
    turn = [*PROMPT, *BEFORE, *INVOCATION, 1]
    heard = ask(bench, alora, turn)
    bench.run(heard)
    assert heard.outcome
    assert heard.outcome.timeline.cached_tokens == 24
    assert heard.tokens == lab.continuation(alora, turn, 4)


def test_nothing_is_looked_up_before_the_manifest_is_here(lab: Any, make_bench: Any, alora: Any) -> None:
    bench = make_bench()
    bench.run(ask(bench, None, PROMPT))
    bench.source.held = True
    heard = ask(bench, alora, PROMPT)
    bench.engine.step()
    [row] = bench.engine._rows.values()
    assert row.traits is None
    assert not hasattr(row, "keys"), "a wrong key can't be asked for"
    bench.source.release()
    bench.run(heard)
    assert heard.outcome
    assert heard.outcome.timeline.cached_tokens == 24
    assert heard.tokens == lab.continuation(alora, PROMPT, 4)


@pytest.mark.parametrize("forward", ["auto", "lean"])
def test_a_prompt_begins_behind_the_bases_blocks_while_the_adapter_arrives(
    lab: Any, make_bench: Any, alora: Any, forward: str
) -> None:
    bench = make_bench(forward=forward)
    bench.run(ask(bench, None, PROMPT))
    bench.source.held = True
    heard = ask(bench, alora, PROMPT)
    courier = bench.courier(alora)
    for layer in range(1, LAYERS + 1):
        courier.send_layers(layer)
        assert bench.engine.step()
    courier.finish()
    bench.run(heard)
    assert heard.outcome
    assert heard.outcome.timeline.cached_tokens == 24
    assert heard.tokens == lab.continuation(alora, PROMPT, 4)
    bench.source.held = False
    assert cached_tokens(bench, alora, PROMPT) == 32
    bench.assert_empty()


def test_a_row_that_gave_way_goes_on_as_it_was(lab: Any, make_bench: Any, alora: Any) -> None:
    bench = make_bench(kv_tokens=96, step_tokens=16)
    heard = [bench.submit(alora, PROMPT, 24), bench.submit(None, [9, *PROMPT], 24)]
    heard.append(bench.submit(lab.adapter(3), PROMPT, 24))
    bench.run(*heard)
    for one, (adapter, prompt) in zip(
        heard, [(alora, PROMPT), (None, [9, *PROMPT]), (lab.adapter(3), PROMPT)], strict=True
    ):
        assert one.tokens == lab.continuation(adapter, prompt, 24)


@st.composite
def conversations(draw: st.DrawFn, names: list[str | None], most: int) -> list[tuple[str | None, list[int]]]:
    """Prompts that begin alike."""
    token = st.integers(0, 1)
    shared = draw(st.lists(token, min_size=8, max_size=most))
    asked = []
    for name in draw(st.lists(st.sampled_from(names), min_size=2, max_size=6)):
        prompt = shared[: draw(st.integers(1, len(shared)))]
        asked.append((name, prompt + draw(st.lists(token, max_size=3))))
    return asked


@settings(max_examples=500, deadline=None)
@given(conversations([None, "a", "b"], 14))
def test_equal_keys_mean_equal_tokens_by_equal_weights(asked: list[tuple[str | None, list[int]]]) -> None:
    # One may begin at the end of a block that another is in already.
    traits = {None: Traits(), "a": Traits((1, 1)), "b": Traits((1, 0, 1))}
    held: dict[bytes, object] = {}
    keys: dict[object, bytes] = {}
    for digest, prompt in asked:
        activation = traits[digest].activation(prompt)
        by = [digest if place >= activation else None for place in range(len(prompt))]
        blocks = len(prompt) // 3
        for index, key in enumerate(BlockKeys(digest, "t", activation).first(blocks, prompt, 3)):
            end = 3 * (index + 1)
            content = (tuple(prompt[:end]), tuple(by[:end]))
            assert held.setdefault(key, content) == content
            assert keys.setdefault(content, key) == key


@pytest.fixture(scope="session")
def short(lab: Any) -> dict[str, Any]:
    return {"base": None, "a": lab.alora(4, [1, 1]), "b": lab.alora(5, [1, 0, 1]), "lora": lab.adapter(2)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations(["base", "a", "b", "lora"], 40))
def test_whatever_was_asked_before_the_answer_is_that_of_an_empty_cache(
    make_bench: Any, short: dict[str, Any], asked: list[tuple[str, list[int]]]
) -> None:
    bench = make_bench(kv_tokens=256, step_tokens=32)
    answer_as_from_an_empty_cache(bench, [(short[name], prompt) for name, prompt in asked])
    bench.engine.stop()
