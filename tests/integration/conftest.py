"""The four services as real processes, with the default base model and the demo adapters."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adaptermesh.local import LocalMeshConfig
from adaptermesh.testing import Rig, run_rig

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "demo.json"
MODELS = Path(os.environ.get("ADAPTERMESH_HOME", Path.home() / ".adaptermesh")) / "models"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """One mesh for all tests that leave it as they found it."""
    config = LocalMeshConfig(home=tmp_path_factory.mktemp("mesh"), models=MODELS, ephemeral_ports=True)
    async with run_rig(config, DEMO) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile_rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """A mesh for tests that kill its processes; they come back at once, however often that happens."""
    config = LocalMeshConfig(
        home=tmp_path_factory.mktemp("fragile"),
        models=MODELS,
        ephemeral_ports=True,
        restart_delays=(0.1,) * 50,
        # A bound, not a wait: a busy machine may take long over the tokens that a drain lets finish.
        drain_seconds=120.0,
    )
    async with run_rig(config, DEMO) as rig:
        yield rig
