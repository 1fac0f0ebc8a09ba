"""The random adapters of the benchmark as a source of the engine: files on this machine, no network."""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import MeshError
from adaptermesh.worker.engine.source import AdapterSink
from tests.bench.adapter_files import CANONICAL_FILE, MANIFEST_FILE

_PIECE_BYTES = 512 * 1024


class LocalSource:
    """Gives the engine `a003`, and `a003#12`: the same weights under another name, hence another digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}
        self._adapters: dict[str, tuple[bytes, Path]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="source")

    def digest(self, name: str) -> str:
        """The digest of an adapter, which can be fetched from now on."""
        if name not in self._digests:
            weights, _, copy = name.partition("#")
            manifest = Manifest.from_bytes((self._folder / weights / MANIFEST_FILE).read_bytes())
            if copy:
                manifest = dataclasses.replace(manifest, name=f"{weights}-copy{copy}")
            self._adapters[manifest.digest] = (manifest.to_bytes(), self._folder / weights / CANONICAL_FILE)
            self._digests[name] = manifest.digest
        return self._digests[name]

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        self._threads.submit(self._send, digest, sink)

    def cancel(self, digest: str) -> None:
        return

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _send(self, digest: str, sink: AdapterSink) -> None:
        manifest, file = self._adapters[digest]
        try:
            sink.begin(manifest)
            with file.open("rb") as stream:
                while piece := stream.read(_PIECE_BYTES):
                    sink.write(piece)
            sink.finish()
        except MeshError as error:
            # A sink that raised has ended by itself and may say so again.
            with contextlib.suppress(MeshError):
                sink.fail(error)
