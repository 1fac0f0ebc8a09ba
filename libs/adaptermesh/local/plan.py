"""Which processes a local mesh runs, and with which settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adaptermesh.client import GATEWAY_SERVICE, ROUTER_SERVICE, STORE_SERVICE, WORKER_SERVICE
from adaptermesh.local.config import HOST, LocalMeshConfig
from adaptermesh.local.ports import Ports


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One process: `python <arguments>` with `environment` on top of what is inherited."""

    name: str
    """ "store", "router", "gateway", "worker-0", ..."""
    role: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    address: str
    """host:port"""
    health_service: str
    """What its health check is asked for."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the services listen, each host:port."""

    gateway: str
    router: str
    store: str
    workers: tuple[str, ...]


Planner = Callable[[LocalMeshConfig, Endpoints], list[ServicePlan]]


def endpoints_of(ports: Ports) -> Endpoints:
    return Endpoints(
        gateway=f"{HOST}:{ports.gateway}",
        router=f"{HOST}:{ports.router}",
        store=f"{HOST}:{ports.store}",
        workers=tuple(f"{HOST}:{port}" for port in ports.workers),
    )


def plan_services(config: LocalMeshConfig, endpoints: Endpoints) -> list[ServicePlan]:
    """The four services, in the order in which they start."""
    model = str(config.model_folder())
    return [
        _plan(config, "store", endpoints.store, STORE_SERVICE, {}),
        _plan(
            config,
            "router",
            endpoints.router,
            ROUTER_SERVICE,
            {"ADAPTERMESH_ROUTER_STORE": endpoints.store},
        ),
        *(
            _plan(
                config,
                "worker",
                address,
                WORKER_SERVICE,
                {
                    "ADAPTERMESH_WORKER_STORE": endpoints.store,
                    "ADAPTERMESH_WORKER_ROUTERS": endpoints.router,
                    "ADAPTERMESH_WORKER_MODEL": model,
                    "ADAPTERMESH_WORKER_ADVERTISE": address,
                },
                index,
            )
            for index, address in enumerate(endpoints.workers)
        ),
        _plan(
            config,
            "gateway",
            endpoints.gateway,
            GATEWAY_SERVICE,
            {"ADAPTERMESH_GATEWAY_ROUTER": endpoints.router, "ADAPTERMESH_GATEWAY_STORE": endpoints.store},
        ),
    ]


def _plan(
    config: LocalMeshConfig,
    role: str,
    address: str,
    health_service: str,
    settings: Mapping[str, str],
    index: int | None = None,
) -> ServicePlan:
    name = role if index is None else f"{role}-{index}"
    return ServicePlan(
        name=name,
        role=role,
        arguments=("-m", f"adaptermesh.{role}"),
        environment={
            "ADAPTERMESH_HOME": str(config.home),
            "ADAPTERMESH_HOST": HOST,
            "ADAPTERMESH_TRACES": str(config.traces),
            "ADAPTERMESH_DRAIN_SECONDS": str(config.drain_seconds),
            f"ADAPTERMESH_{role.upper()}_PORT": address.rpartition(":")[2],
            **settings,
            **config.environment.get(role, {}),
            **config.environment.get(name, {}),
        },
        address=address,
        health_service=health_service,
    )
