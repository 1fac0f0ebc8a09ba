"""Several adapters in one request, through the whole mesh."""

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.client import Code, MeshError, Prompt, Reason
from adaptermesh.testing import Rig

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

GOLDENS = json.loads(
    (Path(__file__).parents[1] / "parity" / "demo" / "goldens.json").read_text(encoding="utf-8")
)


def golden(name: str) -> dict[str, Any]:
    """The first golden answer of a demo adapter, or of the base."""
    found = next(entry for entry in GOLDENS["adapters"] if entry["name"].startswith(name))
    answer: dict[str, Any] = found["answers"][0]
    return answer


async def tokens(rig: Rig, ref: str, prompt_ids: list[int]) -> tuple[str, list[int]]:
    answer = await rig.generate(
        Prompt(token_ids=tuple(prompt_ids)), adapter=ref, max_tokens=GOLDENS["max_new_tokens"]
    )
    return answer.version, list(answer.token_ids)


@pytest.mark.parametrize(
    "expression",
    [
        "stack({0})",
        "average({0},3*{0})",
        "stack(0.25*{0},0.75*{0})",
        "average(0.5*{0})",
        "2*stack({0},-0.5*{0})",
    ],
)
async def test_what_comes_to_one_adapter_gives_its_tokens(rig: Rig, expression: str) -> None:
    expected = golden("pirate-v1")
    version, found = await tokens(rig, expression.format("demo/pirate:v1"), expected["prompt_ids"])
    assert found == expected["token_ids"]
    assert "demo/pirate:v1" in version


async def test_nothing_of_an_adapter_gives_the_tokens_of_the_base(rig: Rig) -> None:
    prompt = golden("pirate-v1")["prompt_ids"]
    _, base = await tokens(rig, "base", prompt)
    version, found = await tokens(rig, "0*demo/pirate:v1", prompt)
    assert (version, found) == ("0.0*demo/pirate:v1", base)


async def test_aliases_in_it_are_resolved_and_told(rig: Rig) -> None:
    prompt = golden("pirate-v1")["prompt_ids"]
    version, first = await tokens(rig, "stack( demo/pirate@prod )", prompt)
    assert (version, first) == ("stack(demo/pirate:v1)", golden("pirate-v1")["token_ids"])


@pytest.mark.parametrize(
    ("ref", "code", "reason"),
    [
        ("stack(demo/pirate:v1, demo/nobody:v1)", Code.NOT_FOUND, Reason.ADAPTER_NOT_FOUND),
        ("stack(demo/pirate:v1", Code.INVALID_ARGUMENT, Reason.INVALID_REF),
        ("average(0*demo/pirate:v1)", Code.INVALID_ARGUMENT, Reason.INVALID_REF),
    ],
)
async def test_what_is_wrong_in_it_is_said(rig: Rig, ref: str, code: Code, reason: Reason) -> None:
    with pytest.raises(MeshError) as raised:
        await rig.generate("Hi", adapter=ref)
    assert (raised.value.code, raised.value.reason) == (code, reason)
