"""A store that asks for keys, and clients of different tenants."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import Publication, StoreClient, UploadResult
from adaptermesh.core.roles import Role
from adaptermesh.store.access.authentication import AuthenticationConfig

ROOT_KEY = "root-" + "r" * 40
Connect = Callable[[str], StoreClient]
KeyFor = Callable[..., Coroutine[Any, Any, StoreClient]]
Upload = Callable[..., Coroutine[Any, Any, UploadResult]]


@pytest.fixture
async def guarded(config: Any, kit: Any) -> AsyncIterator[Any]:
    """With one base model and the tenants `acme` and `other`."""
    authentication = AuthenticationConfig(required=True, root_key=ROOT_KEY)
    async with kit.running_store(kit.replace(config, authentication=authentication)) as store:
        await store.stub.RegisterBaseModel(
            store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()),
            metadata=(("authorization", f"Bearer {ROOT_KEY}"),),
        )
        async with StoreClient(store.target, api_key=ROOT_KEY) as root:
            for tenant in ("acme", "other"):
                await root.set_tenant(tenant)
        yield store


@pytest.fixture
async def connect(guarded: Any) -> AsyncIterator[Connect]:
    """A client with a key."""
    async with AsyncExitStack() as stack:
        clients: list[StoreClient] = []

        def client(api_key: str) -> StoreClient:
            made = StoreClient(guarded.target, api_key=api_key)
            clients.append(made)
            stack.push_async_callback(made.close)
            return made

        yield client


@pytest.fixture
def root(connect: Connect) -> StoreClient:
    return connect(ROOT_KEY)


@pytest.fixture
def key_for(root: StoreClient, connect: Connect) -> KeyFor:
    """A client with a new key of a tenant."""

    async def make(tenant: str, *roles: Role, **options: Any) -> StoreClient:
        made = await root.create_api_key(roles, tenant=tenant, **options)
        return connect(made.secret)

    return make


@pytest.fixture
def upload(tmp_path: Path, kit: Any) -> Upload:
    """Uploads a small adapter with a client."""

    async def send(client: StoreClient, adapter: str = "acme-ns/ner", seed: int = 1) -> UploadResult:
        folder = tmp_path / f"{adapter.replace('/', '-')}-{seed}"
        folder.mkdir(exist_ok=True)
        for name, data in kit.make_files(seed).items():
            (folder / name).write_bytes(data)
        return await client.upload(folder, adapter, Publication("tiny-llama", license="mit"))

    return send
