import socket

import pytest

from adaptermesh.worker.identity import advertised_address, new_worker_id


@pytest.mark.parametrize(
    ("advertise", "host", "expected"),
    [
        ("", "127.0.0.1", "127.0.0.1:7710"),
        ("", "::1", "[::1]:7710"),
        ("", "0.0.0.0", f"{socket.gethostname()}:7710"),
        ("gpu-7", "0.0.0.0", "gpu-7:7710"),
        ("gpu-7:9000", "0.0.0.0", "gpu-7:9000"),
        ("[fd00::7]:9000", "::", "[fd00::7]:9000"),
    ],
)
def test_gateways_are_given_an_address_that_they_can_reach(advertise: str, host: str, expected: str) -> None:
    assert advertised_address(advertise, host, 7710) == expected


def test_a_restarted_worker_has_another_id() -> None:
    one, other = new_worker_id("gpu-7:7710"), new_worker_id("gpu-7:7710")
    assert one != other
    assert one.startswith("gpu-7-7710-")
    assert len(one.rpartition("-")[2]) == 6
