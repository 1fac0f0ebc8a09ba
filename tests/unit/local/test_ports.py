import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptermesh.local import LocalMeshConfig, LocalMeshError
from adaptermesh.local.ports import check_ports, choose_ports, free_ports, is_free


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_with_a_listener_is_not_free(taken: int) -> None:
    assert not is_free(taken)


def test_a_port_in_use_is_named_with_its_service_and_option(taken: int, tmp_path: Path) -> None:
    gateway, router, worker = free_ports(3, random.Random(3))
    config = LocalMeshConfig(
        tmp_path, gateway_port=gateway, router_port=router, store_port=taken, worker_port=worker
    )
    with pytest.raises(LocalMeshError, match=rf"port {taken}, meant for the store, is in use") as caught:
        choose_ports(config, random.Random(1))
    assert "--store-port" in caught.value.hint


def test_one_port_for_two_services_is_refused() -> None:
    (port,) = free_ports(1, random.Random(5))
    with pytest.raises(LocalMeshError, match=f"port {port} is meant for both gateway and router"):
        check_ports([("gateway", "--gateway-port", port), ("router", "--router-port", port)])


def test_workers_take_the_ports_after_the_first(tmp_path: Path) -> None:
    first = next(port for port in free_ports(40, random.Random(7)) if is_free(port + 1) and is_free(port + 2))
    others = [port for port in free_ports(8, random.Random(11)) if not first <= port <= first + 2]
    config = LocalMeshConfig(
        tmp_path,
        workers=3,
        gateway_port=others[0],
        router_port=others[1],
        store_port=others[2],
        worker_port=first,
    )
    assert choose_ports(config, random.Random(1)).workers == (first, first + 1, first + 2)


def test_ephemeral_ports_are_distinct_free_and_never_those_of_outgoing_connections(tmp_path: Path) -> None:
    config = LocalMeshConfig(tmp_path, workers=4, ephemeral_ports=True)
    ports = choose_ports(config, random.Random(2))
    all_ports = [ports.gateway, ports.router, ports.store, *ports.workers]
    assert len(set(all_ports)) == 7
    assert all(is_free(port) and port < 32_768 for port in all_ports)
