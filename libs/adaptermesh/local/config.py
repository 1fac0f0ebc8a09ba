"""What a local mesh is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaptermesh.local.errors import LocalMeshError

HOST = "127.0.0.1"
"""A local mesh has no keys, so nobody but this machine may reach it."""

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class LocalMeshConfig:
    """Where a local mesh keeps its data, which ports it takes, how it is supervised.

    `restart_delays` are the seconds to wait before each restart of a service that keeps crashing; after the
    last one it is given up. Empty never restarts. A service that ran for `stable_seconds` starts over.
    `environment` adds settings by role ("store", "router", "worker", "gateway"), or by name ("worker-1").
    """

    home: Path
    """Store, caches, logs and traces; the base models too, unless `models` says otherwise."""
    model: str = DEFAULT_MODEL
    """A base model of the cache, or a folder."""
    models: Path | None = None
    """The cache of base models; None is `home`/models."""
    workers: int = 1
    gateway_port: int = 7700
    router_port: int = 7701
    store_port: int = 7702
    worker_port: int = 7710
    """The first worker's; the others take the next ones."""
    ephemeral_ports: bool = False
    """Take free ports instead."""
    start_seconds: float = 180.0
    """How long a service may take until it serves; a worker loads its base model in that time."""
    drain_seconds: float = 10.0
    """How long running requests may go on once the mesh is told to stop."""
    kill_seconds: float = 5.0
    """How much longer a service may take before it is killed."""
    restart_delays: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    stable_seconds: float = 30.0
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """One file for each service."""
        return self.home / "logs"

    @property
    def traces(self) -> Path:
        """What `adaptermesh trace` reads."""
        return self.home / "traces"

    def model_folder(self) -> Path:
        """The base model's folder.

        Raises:
            LocalMeshError: it has not been fetched.
        """
        cached = (self.models or self.home / "models") / self.model
        for folder in (cached, Path(self.model)):
            if (folder / "config.json").is_file():
                return folder.resolve()
        raise LocalMeshError(
            f"the base model '{self.model}' is not in {cached.parent}",
            f"fetch it with `adaptermesh models pull {self.model}`",
        )
