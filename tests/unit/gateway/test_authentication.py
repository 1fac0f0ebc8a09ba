"""Who calls the gateway: the store is asked whom a key stands for, not too often and not too seldom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.gateway.authentication import Authentication, AuthenticationConfig
from adaptermesh.gateway.request import Identity
from adaptermesh.gateway.validation import read_caller
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.testing.clock import ManualClock

if TYPE_CHECKING:
    from tests.unit.gateway.conftest import Mesh

KEY = "Bearer amk_abcdefgh_secret"


def caller(tenant: str = "acme", **fields: Any) -> access_pb2.GetCallerResponse:
    return access_pb2.GetCallerResponse(key_id="amk_abcdefgh", tenant=tenant, **fields)


class Rig:
    def __init__(self, mesh: Mesh, channel: grpc.aio.Channel) -> None:
        self.store = mesh.store
        self.clock = ManualClock()
        config = AuthenticationConfig(required=True, cache_seconds=1.0, grace_seconds=60.0)
        self.authentication = Authentication(config, channel, self.clock)

    async def ask(self, authorization: str = KEY) -> Identity | None:
        return await self.authentication.identity({"authorization": authorization})

    async def refusal(self, authorization: str = KEY) -> MeshError:
        with pytest.raises(MeshError) as caught:
            await self.ask(authorization)
        assert "secret" not in f"{caught.value!r}"
        return caught.value


@pytest.fixture
async def rig(mesh: Mesh) -> AsyncIterator[Rig]:
    async with open_channel(mesh.store_address) as channel:
        yield Rig(mesh, channel)


async def test_a_key_stands_for_its_tenant_and_the_store_is_asked_once_a_while(rig: Rig) -> None:
    rig.store.callers[KEY] = caller(namespaces=["one"])
    for _ in range(3):
        assert await rig.ask() == Identity("acme", ("one",))
    assert rig.store.asked == 1
    rig.clock.advance(1.5)
    await rig.ask()
    assert rig.store.asked == 2


async def test_a_revoked_key_ends_when_the_store_is_asked_again_and_does_not_come_back(rig: Rig) -> None:
    rig.store.callers[KEY] = caller()
    await rig.ask()
    del rig.store.callers[KEY]
    rig.clock.advance(1.5)
    assert (await rig.refusal()).code is Code.UNAUTHENTICATED
    rig.store.away = True
    assert (await rig.refusal()).code is Code.UNAVAILABLE


async def test_a_known_key_goes_on_for_a_while_without_the_store_and_an_unknown_one_does_not(
    rig: Rig,
) -> None:
    rig.store.callers[KEY] = caller()
    await rig.ask()
    rig.store.away = True
    rig.clock.advance(59)
    assert (await rig.ask()) == Identity("acme")
    error = await rig.refusal("Bearer other-secret")
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
    rig.clock.advance(2)
    assert (await rig.refusal()).code is Code.UNAVAILABLE


async def test_a_key_ends_at_its_time_also_while_the_store_is_away(rig: Rig) -> None:
    message = caller()
    message.expire_time.FromSeconds(int(rig.clock.wall()) + 2)
    rig.store.callers[KEY] = message
    await rig.ask()
    rig.store.away = True
    rig.clock.advance(3)
    error = await rig.refusal()
    assert error.code is Code.UNAUTHENTICATED
    assert "has expired" in error.message


async def test_a_store_that_asks_for_no_keys_makes_nobody_an_operator(rig: Rig) -> None:
    rig.store.callers[KEY] = access_pb2.GetCallerResponse(tenant="*")
    error = await rig.refusal()
    assert error.code is Code.UNAVAILABLE
    assert "knows none" in error.message


@pytest.mark.parametrize("authorization", ["", "Bearer wrong-secret", "x" * 513])
async def test_without_a_key_nothing_is_answered(rig: Rig, authorization: str) -> None:
    error = await rig.refusal(authorization)
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.KEY_INVALID)


async def test_a_tenant_calls_as_often_as_its_quota_says(rig: Rig) -> None:
    rig.store.callers[KEY] = caller(max_requests_per_minute=2)
    for _ in range(2):
        await rig.ask()
    error = await rig.refusal()
    assert error.reason is Reason.QUOTA_EXCEEDED
    assert error.retry_after == pytest.approx(30)
    rig.clock.advance(30)
    await rig.ask()


@pytest.mark.parametrize(
    ("identity", "asked", "tenant", "restricted"),
    [
        (None, "", "default", False),
        (None, "bank", "bank", False),
        (Identity("acme"), "", "acme", True),
        (Identity("acme"), "acme", "acme", True),
        (Identity("*"), "", "default", False),
        (Identity("*"), "bank", "bank", False),
        (Identity("*", ("one",)), "bank", "bank", True),
    ],
)
def test_the_tenant_is_the_keys_and_an_operators_is_any(
    identity: Identity | None, asked: str, tenant: str, restricted: bool
) -> None:
    found = read_caller({"x-tenant-id": asked}, "r", identity)
    assert (found.tenant, found.is_restricted) == (tenant, restricted)


def test_a_key_of_one_tenant_is_none_of_another() -> None:
    with pytest.raises(MeshError) as caught:
        read_caller({"x-tenant-id": "bank"}, "r", Identity("acme"))
    assert (caught.value.code, caught.value.reason) == (Code.PERMISSION_DENIED, Reason.PERMISSION_DENIED)


async def test_the_router_is_told_whose_request_it_is(mesh: Mesh) -> None:
    mesh.store.callers[KEY] = caller(namespaces=["one", "two"])
    await mesh.add_worker("w1")
    await mesh.start_gateway(authentication="keys")
    seen = await mesh.generate(authorization=KEY, x_model_task="ner")
    assert seen.error is None
    (request,) = mesh.router.requests
    assert (request.tenant, request.restricted, list(request.namespaces)) == ("acme", True, ["one", "two"])
    refused = await mesh.generate(x_model_task="ner")
    assert refused.error is not None
    assert refused.error.reason is Reason.KEY_INVALID
    denied = await mesh.generate(authorization=KEY, x_tenant_id="bank")
    assert denied.error is not None
    assert denied.error.code is Code.PERMISSION_DENIED
    assert len(mesh.router.requests) == 1


async def test_the_list_of_models_is_what_the_store_shows_to_the_caller(mesh: Mesh, fakes: Any) -> None:
    mesh.store.callers[KEY] = caller()
    mesh.store.add(fakes.version("a", 1))
    await mesh.start_gateway(authentication="keys", store_key="the gateway's own")
    request = inference_pb2.ListModelsRequest()
    response = await mesh.stub.ListModels(request, metadata=(("authorization", KEY),), timeout=30)
    assert [model.id for model in response.models] == ["acme/a:v1"]
    assert set(mesh.store.shown) == {KEY}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.stub.ListModels(request, timeout=30)
    assert mesh_error_from(caught.value).reason is Reason.KEY_INVALID


async def test_without_authentication_the_gateway_shows_its_own_key(mesh: Mesh, fakes: Any) -> None:
    mesh.store.add(fakes.version("a", 1))
    await mesh.start_gateway(store_key="its-own")
    await mesh.stub.ListModels(inference_pb2.ListModelsRequest(), timeout=30)
    assert set(mesh.store.shown) == {"Bearer its-own"}
