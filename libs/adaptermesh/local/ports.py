"""TCP ports on loopback: which are free, and who is to have which."""

import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from adaptermesh.local.config import HOST, LocalMeshConfig
from adaptermesh.local.errors import LocalMeshError

# Below the range from which the kernel takes ports of outgoing connections: a service that restarts must
# find its port free again.
_FREE_FROM, _FREE_TO = 15_000, 32_000
_ATTEMPTS = 2_000


@dataclass(frozen=True, slots=True)
class Ports:
    """The port of each service."""

    gateway: int
    router: int
    store: int
    workers: tuple[int, ...]


def choose_ports(config: LocalMeshConfig, rng: random.Random) -> Ports:
    """The configured ports, or free ones.

    Raises:
        LocalMeshError: a configured port is in use; the message names it.
    """
    if config.ephemeral_ports:
        gateway, router, store, *workers = free_ports(3 + config.workers, rng)
        return Ports(gateway, router, store, tuple(workers))
    workers = [config.worker_port + index for index in range(config.workers)]
    wanted = (
        ("gateway", "--gateway-port", config.gateway_port),
        ("router", "--router-port", config.router_port),
        ("store", "--store-port", config.store_port),
        *((f"worker-{index}", "--worker-port", port) for index, port in enumerate(workers)),
    )
    check_ports(wanted)
    return Ports(config.gateway_port, config.router_port, config.store_port, tuple(workers))


def check_ports(wanted: Sequence[tuple[str, str, int]]) -> None:
    """Refuses ports that are taken or asked for twice; each is (service, option, port)."""
    seen: dict[int, str] = {}
    for service, option, port in wanted:
        if port in seen:
            raise LocalMeshError(f"port {port} is meant for both {seen[port]} and {service}", f"set {option}")
        seen[port] = service
        if not is_free(port):
            raise LocalMeshError(
                f"port {port}, meant for the {service}, is in use",
                f"stop what listens there (a mesh that already runs?), or choose another port with {option}",
            )


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections that are merely closing don't count; a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int, rng: random.Random) -> list[int]:
    """Distinct free ports."""
    found: list[int] = []
    for _ in range(_ATTEMPTS):
        port = rng.randrange(_FREE_FROM, _FREE_TO)
        if port not in found and is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise LocalMeshError(f"found no {count} free ports between {_FREE_FROM} and {_FREE_TO}")
