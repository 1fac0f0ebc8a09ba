"""Settings that all services share. Each service adds its own in its `settings.py`."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """Read from the environment: `ADAPTERMESH_<SERVICE>_<NAME>`; the shared ones are `ADAPTERMESH_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_", extra="ignore", populate_by_name=True)

    home: Path = Field(
        default_factory=lambda: Path.home() / ".adaptermesh",
        validation_alias="ADAPTERMESH_HOME",
        description="Folder for everything that is kept on this machine: models, store, caches, traces.",
    )
    host: str = Field(
        default="127.0.0.1",
        validation_alias="ADAPTERMESH_HOST",
        description="Address to listen on. The default takes calls from this machine only.",
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO",
        validation_alias="ADAPTERMESH_LOG_LEVEL",
        description="Least level that is logged.",
    )
    log_json: bool | None = Field(
        default=None,
        validation_alias="ADAPTERMESH_LOG_JSON",
        description="Logs as JSON lines. Unset: yes unless standard error is a terminal.",
    )
    traces: str | None = Field(
        default=None,
        validation_alias="ADAPTERMESH_TRACES",
        description="Folder of the local trace files. Unset: <home>/traces. Empty: none are written.",
    )
    otlp_endpoint: str = Field(
        default="",
        validation_alias="ADAPTERMESH_OTLP_ENDPOINT",
        description="OTLP gRPC endpoint for traces, e.g. http://collector:4317. Empty: traces are not sent.",
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        validation_alias="ADAPTERMESH_DRAIN_SECONDS",
        description="After SIGTERM: how long running requests may take to finish, in seconds.",
    )

    @property
    def trace_dir(self) -> Path | None:
        """Where local trace files go; None for nowhere."""
        if self.traces is None:
            return self.home / "traces"
        return Path(self.traces) if self.traces else None
