"""Clients with the addresses and the key that the environment or the command line give."""

from adaptermesh.cli.output import Output
from adaptermesh.client import MeshClient, StoreClient


def store_client(output: Output, address: str = "") -> StoreClient:
    """A client of the adapter store; its address from the environment if none is given."""
    settings = output.settings
    return StoreClient(address or settings.store, api_key=settings.api_key.get_secret_value())


def other_store_client(output: Output, address: str) -> StoreClient:
    """A client of a store that a version is copied from or to, which is not shown the key of one's own."""
    return StoreClient(address, api_key=output.settings.other_api_key.get_secret_value())


def mesh_client(output: Output, address: str = "") -> MeshClient:
    """A client of a gateway; its address from the environment if none is given."""
    settings = output.settings
    return MeshClient(address or settings.gateway, api_key=settings.api_key.get_secret_value())
