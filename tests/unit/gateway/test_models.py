from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.router.v1 import router_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.gateway.page_token import Place, decode, encode
from adaptermesh.rpc.status import mesh_error_from

if TYPE_CHECKING:
    from tests.unit.gateway.conftest import Fakes, Mesh


def view(worker_id: str, model_id: str) -> router_pb2.WorkerView:
    base = adapter_pb2.BaseModel(model_id=model_id, digest=f"sha256:{model_id}")
    return router_pb2.WorkerView(info=worker_pb2.WorkerInfo(worker_id=worker_id, base_model=base))


async def pages(mesh: Mesh, page_size: int) -> list[list[inference_pb2.Model]]:
    found: list[list[inference_pb2.Model]] = []
    token = ""
    while True:
        request = inference_pb2.ListModelsRequest(page_size=page_size, page_token=token)
        response = await mesh.stub.ListModels(request, timeout=30)
        found.append(list(response.models))
        token = response.next_page_token
        if not token:
            return found
        assert len(found) < 50


async def refused(mesh: Mesh, request: inference_pb2.ListModelsRequest) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.stub.ListModels(request, metadata=(("x-request-id", "req-1"),), timeout=30)
    return mesh_error_from(caught.value)


def fill(mesh: Mesh, fakes: Fakes) -> list[str]:
    """Two bases and four adapters, one of them with older versions that aliases point at."""
    mesh.router.views = [view("w1", "tiny"), view("w2", "tiny"), view("w3", "large")]
    mesh.store.add(fakes.version("a", 1))
    old, older = fakes.version("b", 4, task="then"), fakes.version("b", 2)
    mesh.store.add(fakes.version("b", 5, task="now"), prod=old, stable=old, legacy=older)
    mesh.store.add(fakes.version("c", 2, servable=False, unservable_reason="no op"))
    mesh.store.add(fakes.version("d", 7), latest=fakes.version("d", 7))
    return ["base", "base", "acme/a:v1", "acme/b:v5", "acme/b:v4", "acme/b:v2", "acme/d:v7"]


@pytest.mark.parametrize("page_size", [0, 1, 2, 3, 4, 5, 6, 7, 1000])
async def test_pages_of_any_size_hold_everything_once_and_in_order(
    mesh: Mesh, fakes: Fakes, page_size: int
) -> None:
    expected = fill(mesh, fakes)
    found = await pages(mesh, page_size)
    assert [model.id for page in found for model in page] == expected
    assert all(len(page) <= (page_size or 100) for page in found)


async def test_base_models_come_first_and_each_once(mesh: Mesh, fakes: Fakes) -> None:
    fill(mesh, fakes)
    (page,) = await pages(mesh, 0)
    assert [(model.id, model.base_model_id, model.digest) for model in page[:2]] == [
        ("base", "large", "sha256:large"),
        ("base", "tiny", "sha256:tiny"),
    ]


async def test_a_model_has_its_own_task_and_the_aliases_that_point_at_it(mesh: Mesh, fakes: Fakes) -> None:
    fill(mesh, fakes)
    (page,) = await pages(mesh, 0)
    found = {model.id: model for model in page}
    assert found["acme/b:v5"].task == "now"
    assert list(found["acme/b:v5"].aliases) == []
    assert found["acme/b:v4"].task == "then"
    assert list(found["acme/b:v4"].aliases) == ["prod", "stable"]
    assert found["acme/b:v4"].digest == fakes.version("b", 4).digest
    assert list(found["acme/d:v7"].aliases) == ["latest"]


async def test_what_must_not_be_used_is_not_listed(mesh: Mesh, fakes: Fakes) -> None:
    fill(mesh, fakes)
    first, many = mesh.store.adapters[:2]
    first.unusable_numbers.append(1)
    many.unusable_numbers.append(4)
    (page,) = await pages(mesh, 0)
    assert [model.id for model in page] == ["base", "base", "acme/b:v5", "acme/b:v2", "acme/d:v7"]
    many.ClearField("unusable_numbers")
    (page,) = await pages(mesh, 0)
    assert "acme/b:v4" in [model.id for model in page]


async def test_versions_that_never_change_are_looked_up_once(mesh: Mesh, fakes: Fakes) -> None:
    fill(mesh, fakes)
    await pages(mesh, 0)
    await pages(mesh, 0)
    assert len(mesh.store.resolved) == 2


async def test_an_adapter_uploaded_between_two_pages_repeats_nothing(mesh: Mesh, fakes: Fakes) -> None:
    expected = fill(mesh, fakes)
    first = await mesh.stub.ListModels(inference_pb2.ListModelsRequest(page_size=4), timeout=30)
    fresh = fakes.version("b", 6)
    mesh.store.adapters[1].newest.CopyFrom(fresh)
    token = first.next_page_token
    second = await mesh.stub.ListModels(inference_pb2.ListModelsRequest(page_token=token), timeout=30)
    assert [model.id for model in (*first.models, *second.models)] == expected


@pytest.mark.parametrize("page_size", [-1, 1001])
async def test_a_page_size_out_of_range_is_refused(mesh: Mesh, page_size: int) -> None:
    error = await refused(mesh, inference_pb2.ListModelsRequest(page_size=page_size))
    assert error.code is Code.INVALID_ARGUMENT
    assert error.metadata == {"field": "page_size", "request_id": "req-1"}


@pytest.mark.parametrize("token", ["x", "é", "W10=", "bnVsbA==", "WzEsMiwzLDRd", "A" * 5000])
async def test_a_foreign_page_token_is_refused(mesh: Mesh, token: str) -> None:
    error = await refused(mesh, inference_pb2.ListModelsRequest(page_token=token))
    assert error.code is Code.INVALID_ARGUMENT
    assert error.metadata["field"] == "page_token"


async def test_a_store_that_is_gone_is_said_so(peers: Mesh) -> None:
    await peers.start_gateway(store="127.0.0.1:1")
    error = await refused(peers, inference_pb2.ListModelsRequest())
    assert error.code is Code.UNAVAILABLE
    assert error.reason is Reason.STORE_UNREACHABLE
    assert error.metadata["request_id"] == "req-1"


async def test_a_list_carries_the_request_id(mesh: Mesh) -> None:
    call = mesh.stub.ListModels(
        inference_pb2.ListModelsRequest(), metadata=(("x-request-id", "req-1"),), timeout=30
    )
    await call
    assert ("x-request-id", "req-1") in [tuple(pair) for pair in await call.initial_metadata()]


def test_a_page_token_comes_back_as_it_went_out() -> None:
    for place in (Place(bases_after=""), Place(None, "token", "acme/ner", 3), Place("tiny sha256:1")):
        assert decode(encode(place)) == place
    assert decode("") == Place(bases_after="")
