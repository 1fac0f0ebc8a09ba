"""Adapters on their way into host memory: from the store through a sink, or from the disk cache."""

from dataclasses import dataclass
from typing import Protocol

from adaptermesh.artifact.composing import identity_of
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.host_arena import Landing, corrupt


@dataclass(slots=True, eq=False)
class Transfer:
    """One transfer of one adapter; a later one of the same adapter is another object.

    `starter` is the holder for whom it was started. `from_store` False: it comes from the disk cache; else
    `manifest` is what the store sent of it.
    """

    digest: str
    starter: str
    from_store: bool
    start_ns: int
    end_ns: int = 0
    landing: Landing | None = None
    manifest: bytes = b""


class Landings(Protocol):
    """What a transfer needs of the residency. Every method takes the engine's lock."""

    def open_landing(self, transfer: Transfer, manifest: Manifest) -> Landing:
        """Checks the manifest and gives it room; raises MeshError as `AdapterSink.begin` does."""
        ...

    def landed(self, transfer: Transfer) -> None:
        """All bytes are there and verified."""
        ...

    def transfer_failed(self, transfer: Transfer, error: MeshError) -> None:
        """Whoever waits for it fails; without effect if the transfer is not the current one."""
        ...

    def layers_arrived(self, transfer: Transfer) -> None:
        """More leading layers of the landing are there and verified."""
        ...

    def is_current(self, transfer: Transfer) -> bool:
        """False once it ended or was called off."""
        ...


class FetchSink:
    """The end of one fetch from the store. Used by one thread at a time."""

    def __init__(self, landings: Landings, transfer: Transfer) -> None:
        self._landings = landings
        self._transfer = transfer

    def begin(self, manifest: bytes) -> None:
        self._check_current()
        try:
            parsed = Manifest.from_bytes(manifest)
            if identity_of(parsed, digest_bytes(manifest)) != self._transfer.digest:
                raise corrupt(self._transfer.digest, "the manifest has another digest")
            self._transfer.manifest = manifest
            landing = self._transfer.landing = self._landings.open_landing(self._transfer, parsed)
        except MeshError as error:
            self._landings.transfer_failed(self._transfer, error)
            raise
        if landing.layers_ready:
            self._landings.layers_arrived(self._transfer)

    def write(self, data: bytes | memoryview) -> None:
        landing = self._begun()
        before = landing.layers_ready
        try:
            landing.write(data)
        except MeshError as error:
            self._landings.transfer_failed(self._transfer, error)
            raise
        if landing.layers_ready > before:
            self._landings.layers_arrived(self._transfer)

    def finish(self) -> None:
        landing = self._begun()
        try:
            landing.finish()
        except MeshError as error:
            self._landings.transfer_failed(self._transfer, error)
            raise
        self._landings.landed(self._transfer)

    def fail(self, error: MeshError) -> None:
        self._landings.transfer_failed(self._transfer, error)

    def _begun(self) -> Landing:
        self._check_current()
        if self._transfer.landing is None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, "bytes came before the manifest")
        return self._transfer.landing

    def _check_current(self) -> None:
        if not self._landings.is_current(self._transfer):
            raise MeshError(Code.CANCELLED, Reason.CANCELLED, "nobody waits for this fetch any more")
