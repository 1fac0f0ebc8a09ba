import asyncio
import json
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code


async def register(store: Any, base: adapter_pb2.BaseModel) -> store_pb2.RegisterBaseModelResponse:
    response: store_pb2.RegisterBaseModelResponse = await store.stub.RegisterBaseModel(
        store_pb2.RegisterBaseModelRequest(base_model=base)
    )
    return response


async def test_a_base_model_is_registered_once(empty_store: Any, kit: Any) -> None:
    outcomes = await asyncio.gather(*(register(empty_store, kit.base_model()) for _ in range(5)))
    assert sum(outcome.created for outcome in outcomes) == 1
    assert {outcome.feed_position for outcome in outcomes} == {1}
    other = await register(empty_store, kit.base_model(weights="others"))
    assert (other.created, other.feed_position) == (True, 2)


async def test_the_same_digest_under_another_name_changes_nothing(empty_store: Any, kit: Any) -> None:
    await register(empty_store, kit.base_model("first"))
    again = await register(empty_store, kit.base_model("second"))
    assert not again.created
    snapshot = await empty_store.snapshot()
    assert [base.model_id for base in snapshot.base_models] == ["first"]


@pytest.mark.parametrize(
    "fields",
    [
        {"digest": digest_bytes(b"x")},
        {"config_digest": digest_bytes(b"x")},
        {"weights_digest": digest_bytes(b"x")},
        {"weights_digest": "none"},
        {"architecture": "GPT2LMHeadModel"},
        {"hidden_size": 33},
        {"num_layers": 0},
        {"vocab_size": 65},
        {"model_id": ""},
        {"model_id": "a\nb"},
        {"model_id": "x" * 201},
        {"config_json": "{"},
        {"config_json": "[]"},
        {"config_json": "[" * 60_000},
        {"config_json": json.dumps({"x": "y" * 2**16})},
        {"config_json": "{}"},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_facts_that_do_not_follow_from_the_config_are_refused(
    empty_store: Any, kit: Any, fields: dict[str, Any]
) -> None:
    base = kit.base_model()
    for name, value in fields.items():
        setattr(base, name, value)
    async with kit.refused() as errors:
        await register(empty_store, base)
    assert errors[0].code is Code.INVALID_ARGUMENT
    assert (await empty_store.snapshot()).feed_position == 0


async def test_base_models_are_listed_by_name_and_digest_in_pages(empty_store: Any, kit: Any) -> None:
    bases = [kit.base_model(name, weights) for name in ("b", "a") for weights in ("1", "2")]
    for base in bases:
        await register(empty_store, base)
    listed: list[adapter_pb2.BaseModel] = []
    token = ""
    while not listed or token:
        request = store_pb2.ListBaseModelsRequest(page_size=1, page_token=token)
        page = await empty_store.stub.ListBaseModels(request)
        listed += page.base_models
        token = page.next_page_token
    # Two weights, so two digests; the second name of each is no other base model.
    assert [(base.model_id, base.digest) for base in listed] == sorted(
        (base.model_id, base.digest) for base in bases[:2]
    )
