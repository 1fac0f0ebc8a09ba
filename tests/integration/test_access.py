"""The four services as real processes that ask for API keys."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adaptermesh.client import Ask, Code, MeshClient, MeshError, Reason, Role, SamplingParams, StoreClient
from adaptermesh.local import LocalMeshConfig
from adaptermesh.testing import Rig, run_rig
from adaptermesh.testing.polling import eventually
from tests.integration.conftest import DEMO, MODELS

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

ROOT_KEY = "root-" + "k" * 40
FEW = SamplingParams(temperature=0.0, max_tokens=4)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """A mesh in which everybody needs a key; the demo's adapters belong to the default tenant."""
    config = LocalMeshConfig(
        home=tmp_path_factory.mktemp("guarded"),
        models=MODELS,
        ephemeral_ports=True,
        restart_delays=(0.1,) * 50,
        environment={
            "store": {"ADAPTERMESH_STORE_AUTHENTICATION": "keys", "ADAPTERMESH_STORE_ROOT_KEY": ROOT_KEY},
            "router": {"ADAPTERMESH_ROUTER_STORE_KEY": ROOT_KEY},
            "worker": {"ADAPTERMESH_WORKER_STORE_KEY": ROOT_KEY},
            "gateway": {"ADAPTERMESH_GATEWAY_AUTHENTICATION": "keys"},
        },
    )
    async with run_rig(config, DEMO, ROOT_KEY) as rig:
        yield rig


async def ask(rig: Rig, api_key: str, position: int = 0, task: str = "", adapter: str = "") -> str:
    """The version that answered."""
    async with MeshClient(rig.mesh.endpoints.gateway, api_key=api_key) as client:
        asked = Ask(min_feed_position=position)
        answer = await client.complete(
            "Hello.", task=task, adapter=adapter, sampling=FEW, ask=asked, timeout=120
        )
    return answer.version


async def refusal(rig: Rig, api_key: str, position: int = 0, **target: str) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await ask(rig, api_key, position, **target)
    assert api_key not in f"{caught.value!r}" or not api_key
    return caught.value


async def test_a_tenant_is_served_what_is_its_own_or_granted_and_nothing_else(guarded: Rig) -> None:
    store = guarded.store
    theirs = await store.create_api_key([Role.READER], tenant="default")
    await store.set_tenant("partner")
    partner = await store.create_api_key([Role.READER], tenant="partner")
    (task, adapter), *_ = guarded.adapters.items()
    ref = f"{adapter.ref}:v1"
    assert await ask(guarded, theirs.secret, partner.feed_position, task=task) == ref
    for target in ({"task": task}, {"adapter": ref}, {"adapter": f"stack({ref})"}):
        error = await refusal(guarded, partner.secret, partner.feed_position, **target)
        unknown = Reason.TASK_NOT_FOUND if "task" in target else Reason.ADAPTER_NOT_FOUND
        assert (error.code, error.reason) == (Code.NOT_FOUND, unknown), target
    assert await ask(guarded, partner.secret, adapter="base") == "base"
    namespace, _, name = adapter.ref.partition("/")
    change = await store.set_grant(namespace, "partner", [Role.READER], name=name)
    assert await ask(guarded, partner.secret, change.feed_position, adapter=ref) == ref
    async with MeshClient(guarded.mesh.endpoints.gateway, api_key=partner.secret) as client:
        listed = {model.id.rpartition(":")[0] for model in await client.list_models()}
    assert listed - {""} == {adapter.ref}
    position = await store.delete_grant(namespace, "partner", name=name)
    assert (await refusal(guarded, partner.secret, position, adapter=ref)).code is Code.NOT_FOUND


async def test_a_key_that_is_revoked_ends_within_seconds_and_none_at_all_at_once(guarded: Rig) -> None:
    made = await guarded.store.create_api_key([Role.READER], tenant="default")
    assert await ask(guarded, made.secret, adapter="base") == "base"
    await guarded.store.revoke_api_key(made.key.key_id)

    async def refused() -> bool:
        try:
            await ask(guarded, made.secret, adapter="base")
        except MeshError as error:
            assert error.reason is Reason.KEY_INVALID
            return True
        return False

    await eventually(refused, within=30)
    for api_key in ("", "amk_abcdefgh_" + "x" * 43):
        error = await refusal(guarded, api_key, adapter="base")
        assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.KEY_INVALID)


async def test_known_keys_are_served_while_the_store_is_killed_and_comes_back(guarded: Rig) -> None:
    made = await guarded.store.create_api_key([Role.READER], tenant="default")
    (adapter, *_) = guarded.adapters.values()
    ref = f"{adapter.ref}:v1"
    assert await ask(guarded, made.secret, made.feed_position, adapter=ref) == ref
    await guarded.mesh.kill("store")
    assert await ask(guarded, made.secret, adapter=ref) == ref

    async def is_back() -> bool:
        async with StoreClient(guarded.mesh.endpoints.store, api_key=made.secret) as client:
            try:
                return (await client.caller()).tenant == "default"
            except MeshError as error:
                assert error.code is Code.UNAVAILABLE
                return False

    await eventually(is_back, within=60)


async def test_no_key_is_in_any_log(guarded: Rig, tmp_path: Path) -> None:
    home = guarded.mesh.config.home
    texts = [path.read_text(errors="replace") for path in home.rglob("*.log")]
    assert texts
    assert not any(ROOT_KEY in text for text in texts)
