"""Our engine, used as a library."""

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import torch

from adaptermesh.core.clock import SystemClock
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.engine import Engine
from tests.bench.peers.local_source import LocalSource
from tests.bench.peers.rows import Rows
from tests.bench.peers.serve import serve


class EnginePeer:
    """One engine; `options` are fields of `EngineConfig`."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._source: LocalSource | None = None
        self._engine: Engine | None = None
        self._rows: Rows | None = None

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        config = EngineConfig(disk_dir=self._disk, dtype="float32", **message["options"])
        base = load_base(Path(message["model"]), config)
        # What a decode step reads at least once; tied matrices count once. The engine may take the base's
        # matrices for itself, so they are counted before.
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in base.model.parameters())
        self._source = LocalSource(Path(message["adapters"]))
        self._engine = Engine(config, base, self._source, SystemClock())
        self._rows = Rows(self._engine, self._source.digest)
        versions = {name: importlib.metadata.version(name) for name in ("adaptermesh", "torch")}
        return {"versions": versions, "threads": torch.get_num_threads(), "weight_bytes": weight_bytes}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._rows is None:
            raise RuntimeError("load comes first")
        return self._rows.run(message["workload"])

    def close(self) -> None:
        if self._engine is not None:
            self._engine.stop()
        if self._source is not None:
            self._source.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="adaptermesh-bench-") as folder:
        peer = EnginePeer(Path(folder))
        serve({"load": peer.load, "run": peer.run})
        peer.close()
