"""What one of the databases can't keep is refused by all of them."""

import base64
import json
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code


async def test_a_nul_character_is_refused_in_every_text(store: Any, publish: Any, kit: Any) -> None:
    await publish()
    nul = "a\0b"
    base = kit.base_model(nul)
    point: dict[str, Any] = {"namespace": "acme", "name": "ner", "alias": "prod", "version_number": 1}
    calls = [
        lambda: store.upload(kit.make_files(2), description=nul),
        lambda: store.upload(kit.make_files(2), license=nul),
        lambda: store.upload(kit.make_files(2), tags=[nul]),
        lambda: store.upload(kit.make_files(2), base_model=nul),
        lambda: store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base)),
        lambda: store.stub.SetAlias(store_pb2.SetAliasRequest(**point, actor=nul)),
        lambda: store.stub.SetAlias(store_pb2.SetAliasRequest(**point, comment=nul)),
        lambda: store.stub.ListAdapters(store_pb2.ListAdaptersRequest(query=nul)),
        lambda: store.stub.ListAdapters(store_pb2.ListAdaptersRequest(task=nul)),
        lambda: store.stub.ListAdapters(store_pb2.ListAdaptersRequest(base_model=nul)),
        lambda: store.stub.ListAdapters(store_pb2.ListAdaptersRequest(tags=[nul])),
        lambda: store.stub.ListRoutes(store_pb2.ListRoutesRequest(tenant=nul)),
    ]
    for call in calls:
        async with kit.refused() as errors:
            await call()
        assert errors[0].code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("number", [-1, 2**31, 2**63, 2**70])
async def test_a_page_token_with_a_number_that_no_list_has_is_refused(
    store: Any, publish: Any, kit: Any, number: int
) -> None:
    await publish(seeds=(1, 2))
    request = store_pb2.ListVersionsRequest(namespace="acme", name="ner", page_size=1)
    token = (await store.stub.ListVersions(request)).next_page_token
    scope, *_ = json.loads(base64.urlsafe_b64decode(token))
    request.page_token = base64.urlsafe_b64encode(json.dumps([scope, number]).encode()).decode()
    async with kit.refused() as errors:
        await store.stub.ListVersions(request)
    assert errors[0].metadata == {"field": "page_token"}


async def test_the_largest_values_are_kept(store: Any, kit: Any) -> None:
    base = kit.base_model("m" * 200)
    await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
    version = (
        await store.upload(
            kit.make_files(),
            name="n" * 63,
            namespace="a" * 63,
            task="t" * 63,
            base_model=base.digest,
            description="\N{SNOWMAN}" * 1365,
            license="l" * 256,
            tags=[f"{number:02}" + "g" * 62 for number in range(32)],
        )
    ).version
    assert (await store.snapshot()).versions[0] == version
    point: dict[str, Any] = {"namespace": "a" * 63, "name": "n" * 63, "alias": "p" * 63, "version_number": 1}
    request = store_pb2.SetAliasRequest(**point, actor="b" * 256, comment="\N{SNOWMAN}" * 1024)
    alias = (await store.stub.SetAlias(request)).alias
    assert (await store.snapshot()).aliases[0] == alias


async def test_an_architecture_that_is_too_long_is_refused(store: Any, kit: Any) -> None:
    base = kit.base_model("long")
    config = json.loads(base.config_json) | {"architectures": ["L" * 201]}
    base.config_json, base.architecture = json.dumps(config), "L" * 201
    async with kit.refused() as errors:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
    assert errors[0].metadata["field"] == "base_model.architecture"
