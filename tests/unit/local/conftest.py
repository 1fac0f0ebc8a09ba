from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from adaptermesh.client import GATEWAY_SERVICE, ROUTER_SERVICE, STORE_SERVICE, WORKER_SERVICE
from adaptermesh.local import Endpoints, LocalMeshConfig, MeshEvent, ServicePlan

ROOT = Path(__file__).parents[3]
SERVICES = {
    "store": STORE_SERVICE,
    "router": ROUTER_SERVICE,
    "worker": WORKER_SERVICE,
    "gateway": GATEWAY_SERVICE,
}
MakePlanner = Callable[..., Callable[[LocalMeshConfig, Endpoints], list[ServicePlan]]]


@pytest.fixture
def config(tmp_path: Path) -> LocalMeshConfig:
    return LocalMeshConfig(
        home=tmp_path / "home",
        ephemeral_ports=True,
        start_seconds=60.0,
        drain_seconds=20.0,
        kill_seconds=20.0,
        restart_delays=(0.0, 0.0),
    )


@pytest.fixture
def events() -> list[MeshEvent]:
    return []


@pytest.fixture
def plan_fakes() -> MakePlanner:
    """Plans fake services for the given names; each behaves as told."""

    def make(
        *names: str, behaviour: Mapping[str, str] | None = None
    ) -> Callable[[LocalMeshConfig, Endpoints], list[ServicePlan]]:
        def plan(config: LocalMeshConfig, endpoints: Endpoints) -> list[ServicePlan]:
            addresses = {
                "gateway": endpoints.gateway,
                "router": endpoints.router,
                "store": endpoints.store,
                **{f"worker-{index}": address for index, address in enumerate(endpoints.workers)},
            }
            return [
                ServicePlan(
                    name=name,
                    role=(role := name.partition("-")[0]),
                    arguments=(
                        "-m",
                        "tests.unit.local.fake_service",
                        role,
                        (behaviour or {}).get(name, "good"),
                    ),
                    environment={
                        "PYTHONPATH": str(ROOT),
                        "FAKE_WORKERS": ",".join(endpoints.workers),
                        f"ADAPTERMESH_{role.upper()}_PORT": addresses[name].rpartition(":")[2],
                    },
                    address=addresses[name],
                    health_service=SERVICES[role],
                )
                for name in names
            ]

        return plan

    return make
