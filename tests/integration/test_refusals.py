"""What is wrong is refused with a code, a reason and the name, and leaves nothing behind."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptermesh.client import Ask, Code, MeshError, Publication, Reason, SamplingParams
from adaptermesh.testing import Rig

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

PIRATE = Path(__file__).parents[2] / "deploy" / "demo" / "adapters" / "pirate-v1"
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("choice", "reason", "name"),
    [
        ({"task": "no-such-task"}, Reason.TASK_NOT_FOUND, "no-such-task"),
        ({"adapter": "demo/nobody:v1"}, Reason.ADAPTER_NOT_FOUND, "demo/nobody"),
        ({"adapter": "demo/pirate:v99"}, Reason.VERSION_NOT_FOUND, "demo/pirate:v99"),
        ({"adapter": "demo/pirate@nowhere"}, Reason.ALIAS_NOT_FOUND, "demo/pirate@nowhere"),
        ({"adapter": f"demo/pirate@sha256:{'0' * 64}"}, Reason.VERSION_NOT_FOUND, "demo/pirate@sha256:"),
    ],
)
async def test_an_unknown_name_is_not_found_and_named(
    rig: Rig, choice: dict[str, str], reason: Reason, name: str
) -> None:
    with pytest.raises(MeshError) as raised:
        await rig.generate("Hi", **choice)  # type: ignore[arg-type]
    assert (raised.value.code, raised.value.reason) == (Code.NOT_FOUND, reason)
    assert raised.value.metadata["name"].startswith(name)
    assert raised.value.metadata["request_id"]
    assert name in raised.value.message


async def test_an_unknown_base_is_not_found(rig: Rig) -> None:
    with pytest.raises(MeshError) as raised:
        await rig.client.complete("Hi", task="pirate", ask=Ask(base_model="gpt-17"))
    assert (raised.value.code, raised.value.reason) == (Code.NOT_FOUND, Reason.BASE_NOT_FOUND)
    assert raised.value.metadata["name"] == "gpt-17"


async def test_an_adapter_of_another_base_is_refused_with_both_digests(rig: Rig) -> None:
    """The second base differs in its weights only, so every shape fits: only the digest tells."""
    import grpc.aio

    from adaptermesh.api.adapter.v1 import adapter_pb2
    from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
    from adaptermesh.artifact.base_facts import BaseFacts

    async with grpc.aio.insecure_channel(rig.mesh.endpoints.store) as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        [known] = [
            base
            for base in (await stub.ListBaseModels(store_pb2.ListBaseModelsRequest())).base_models
            if base.model_id == rig.base_model
        ]
        other = BaseFacts.from_config("other-base", json.loads(known.config_json), f"sha256:{'1' * 64}")
        message = adapter_pb2.BaseModel(
            model_id=other.model_id,
            digest=other.digest,
            config_digest=other.config_digest,
            weights_digest=other.weights_digest,
            architecture=known.architecture,
            hidden_size=known.hidden_size,
            num_layers=known.num_layers,
            vocab_size=known.vocab_size,
            config_json=known.config_json,
        )
        await stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=message))
    upload = await rig.store.upload(PIRATE, "other/pirate", Publication("other-base"))
    with pytest.raises(MeshError) as asked:
        await rig.generate("Hi", adapter="other/pirate:v1", position=upload.feed_position)
    assert (asked.value.code, asked.value.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert {other.digest, known.digest} <= set(asked.value.metadata.values())
    with pytest.raises(MeshError) as relied:
        await rig.client.complete("Hi", task="pirate", ask=Ask(base_model="other-base"))
    assert (relied.value.code, relied.value.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert {other.digest, known.digest} <= set(relied.value.metadata.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 9.0), ("top_p", 0.0), ("top_k", -1), ("max_tokens", 0), ("seed", -1)],
)
async def test_a_bad_sampling_value_is_refused_with_its_field(rig: Rig, field: str, value: float) -> None:
    """Past the client, which checks too: over the wire."""
    import grpc.aio

    from adaptermesh.api.inference.v1 import inference_pb2, inference_pb2_grpc
    from adaptermesh.rpc.status import mesh_error_from

    sampling = inference_pb2.SamplingParams()
    setattr(sampling, field, value)
    async with grpc.aio.insecure_channel(rig.mesh.endpoints.gateway) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(text="Hi", sampling=sampling), timeout=30
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in call:
                pass
    error = mesh_error_from(raised.value)
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    assert error.metadata["field"] == f"sampling.{field}"


def wrong_shape(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["r"] += 1
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return "shape"


def truncated(folder: Path) -> str:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    return WEIGHTS


def not_a_number(folder: Path) -> str:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    (folder / WEIGHTS).write_bytes(data)
    return "finite"


@pytest.mark.parametrize("spoil", [wrong_shape, truncated, not_a_number])
async def test_a_broken_adapter_is_refused_with_the_reason_and_nothing_of_it_is_visible(
    rig: Rig, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(PIRATE, folder)
    expected = spoil(folder)
    name = f"broken/{spoil.__name__.replace('_', '-')}"
    with pytest.raises(MeshError) as raised:
        await rig.store.upload(folder, name, Publication(rig.base_model))
    assert (raised.value.code, raised.value.reason) == (Code.INVALID_ARGUMENT, Reason.ADAPTER_REJECTED)
    assert expected in raised.value.message
    assert await rig.store.list_adapters(namespace="broken") == []
    with pytest.raises(MeshError) as asked:
        await rig.generate("Hi", adapter=f"{name}:v1")
    assert asked.value.reason is Reason.ADAPTER_NOT_FOUND


async def test_a_prompt_longer_than_the_context_is_refused(rig: Rig) -> None:
    with pytest.raises(MeshError) as raised:
        await rig.client.complete("word " * 20000, adapter="base", sampling=SamplingParams(max_tokens=1))
    assert raised.value.reason is Reason.PROMPT_TOO_LONG
