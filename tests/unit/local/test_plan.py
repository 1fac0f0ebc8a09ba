from pathlib import Path

import pytest

from adaptermesh.local import Endpoints, LocalMeshConfig, ServicePlan
from adaptermesh.local.plan import endpoints_of, plan_services
from adaptermesh.local.ports import Ports

ENDPOINTS = endpoints_of(Ports(gateway=1, router=2, store=3, workers=(4, 5)))


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, ServicePlan]:
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    config = LocalMeshConfig(
        home=tmp_path,
        model="tiny",
        environment={"worker": {"ADAPTERMESH_WORKER_DEVICE_SLOTS": "3"}, "worker-1": {"X": "y"}},
    )
    return {plan.name: plan for plan in plan_services(config, ENDPOINTS)}


def test_endpoints_are_on_loopback_only() -> None:
    assert Endpoints("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", ("127.0.0.1:4", "127.0.0.1:5")) == ENDPOINTS


def test_the_store_starts_first_and_services_are_started_by_module_name(
    plans: dict[str, ServicePlan],
) -> None:
    assert list(plans) == ["store", "router", "worker-0", "worker-1", "gateway"]
    assert plans["worker-1"].arguments == ("-m", "adaptermesh.worker")


def test_each_service_is_told_where_the_others_are(plans: dict[str, ServicePlan], tmp_path: Path) -> None:
    assert plans["router"].environment["ADAPTERMESH_ROUTER_STORE"] == "127.0.0.1:3"
    assert plans["gateway"].environment["ADAPTERMESH_GATEWAY_ROUTER"] == "127.0.0.1:2"
    worker = plans["worker-1"].environment
    assert worker["ADAPTERMESH_WORKER_PORT"] == "5"
    assert worker["ADAPTERMESH_WORKER_ADVERTISE"] == "127.0.0.1:5"
    assert worker["ADAPTERMESH_WORKER_ROUTERS"] == "127.0.0.1:2"
    assert worker["ADAPTERMESH_WORKER_STORE"] == "127.0.0.1:3"
    assert worker["ADAPTERMESH_WORKER_MODEL"] == str(tmp_path / "models" / "tiny")


def test_settings_are_added_by_role_and_by_name(plans: dict[str, ServicePlan]) -> None:
    assert plans["worker-0"].environment["ADAPTERMESH_WORKER_DEVICE_SLOTS"] == "3"
    assert "X" not in plans["worker-0"].environment
    assert plans["worker-1"].environment["X"] == "y"
    assert "ADAPTERMESH_WORKER_DEVICE_SLOTS" not in plans["store"].environment
