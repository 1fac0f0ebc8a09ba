"""What every part of the store's gRPC face has."""

from adaptermesh.store.stores import Stores


class WithStores:
    """The store's parts, once they are open: the port is bound before the catalogue is."""

    def __init__(self, stores: Stores) -> None:
        self._all = stores

    @property
    def _stores(self) -> Stores:
        """Raises MeshError UNAVAILABLE before they are open."""
        self._all.check_open()
        return self._all
