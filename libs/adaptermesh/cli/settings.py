"""What the command reads from the environment; options on the command line win."""

from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from adaptermesh.client import DEFAULT_GATEWAY, DEFAULT_ROUTER, DEFAULT_STORE


class CliSettings(BaseSettings):
    """Where the mesh is and what is kept here: `ADAPTERMESH_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_", extra="ignore", populate_by_name=True)

    gateway: str = Field(default=DEFAULT_GATEWAY, description="host:port of a gateway.")
    router: str = Field(default=DEFAULT_ROUTER, description="host:port of a router.")
    store: str = Field(default=DEFAULT_STORE, description="host:port of the adapter store.")
    api_key: SecretStr = Field(
        default=SecretStr(""),
        description="API key for store and gateway, where they ask for one. Empty: none is shown.",
    )
    other_api_key: SecretStr = Field(
        default=SecretStr(""),
        description="API key for the other store of `adapters copy` and `import`. Empty: none is shown.",
    )
    tenant: str = Field(
        default="",
        description="The tenant to act for, where no authentication is configured. Empty: the default.",
    )
    home: Path = Field(
        default_factory=lambda: Path.home() / ".adaptermesh",
        description="Folder for everything kept on this machine: models, store, caches, logs, traces.",
    )
    traces: str = Field(default="", description="Folder of the local trace files. Empty: <home>/traces.")
    columns: int = Field(
        default=0,
        ge=0,
        validation_alias=AliasChoices("COLUMNS", "columns"),
        description="Width of the output in characters. 0: the terminal's, or 120 without one.",
    )

    @property
    def trace_dir(self) -> Path:
        """Where `trace` looks."""
        return Path(self.traces) if self.traces else self.home / "traces"
