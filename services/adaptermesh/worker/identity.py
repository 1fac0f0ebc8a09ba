"""Who this worker is: an id that no other process life has, and the address that gateways dial."""

import re
import secrets
import socket

_UNSPECIFIED = frozenset({"", "0.0.0.0", "::", "[::]"})  # noqa: S104  # compared with, not bound


def advertised_address(advertise: str, host: str, port: int) -> str:
    """`host:port` for gateways.

    A bound host stands for itself; a worker that listens everywhere is reached by its host name.
    `advertise` wins; without a port it gets the bound one.
    """
    if advertise:
        return advertise if re.search(r":\d+$", advertise) else f"{_bracketed(advertise)}:{port}"
    name = socket.gethostname() if host in _UNSPECIFIED else host
    return f"{_bracketed(name)}:{port}"


def new_worker_id(address: str) -> str:
    """`<host>-<port>-<6 hex digits>`: a restarted worker has another id."""
    host, _, port = address.rpartition(":")
    return f"{host.strip('[]')}-{port}-{secrets.token_hex(3)}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
