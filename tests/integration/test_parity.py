"""Through the whole mesh: greedy tokens are those of transformers + peft on the same weights."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.client import Generation, Prompt
from adaptermesh.testing import Rig

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

GOLDENS = json.loads(
    (Path(__file__).parents[1] / "parity" / "demo" / "goldens.json").read_text(encoding="utf-8")
)


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(ref, golden answer) of every adapter version and of the base."""
    found = []
    for entry in GOLDENS["adapters"]:
        name, _, number = entry["name"].rpartition("-v")
        ref = f"demo/{name}:v{number}" if entry["dir"] else "base"
        found += [(ref, answer) for answer in entry["answers"]]
    return found


async def ask(rig: Rig, ref: str, golden: dict[str, Any]) -> Generation:
    prompt = Prompt(token_ids=tuple(golden["prompt_ids"]))
    return await rig.generate(prompt, adapter=ref, max_tokens=GOLDENS["max_new_tokens"])


def check(ref: str, golden: dict[str, Any], answer: Generation) -> None:
    assert answer.version == ref
    assert (list(answer.token_ids), answer.finished.finish_reason) == (golden["token_ids"], golden["finish"])
    assert answer.text == golden["text"]


@pytest.mark.parametrize(
    ("ref", "golden"), cases(), ids=lambda value: value if isinstance(value, str) else ""
)
async def test_alone_the_tokens_are_those_of_peft(rig: Rig, ref: str, golden: dict[str, Any]) -> None:
    check(ref, golden, await ask(rig, ref, golden))


async def test_mixed_with_all_others_in_one_batch_the_tokens_are_those_of_peft(rig: Rig) -> None:
    mixed = cases() * 2
    random.Random(1).shuffle(mixed)
    answers = await asyncio.gather(*(ask(rig, ref, golden) for ref, golden in mixed))
    for (ref, golden), answer in zip(mixed, answers, strict=True):
        check(ref, golden, answer)


async def test_the_chat_template_is_the_one_that_peft_was_asked_with(rig: Rig) -> None:
    ref, golden = next(case for case in cases() if case[0] != "base")
    answer = await rig.generate(golden["prompt"], adapter=ref, max_tokens=GOLDENS["max_new_tokens"])
    assert answer.started.prompt_tokens == len(golden["prompt_ids"])
    check(ref, golden, answer)
