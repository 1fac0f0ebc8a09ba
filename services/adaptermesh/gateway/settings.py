"""The gateway's settings: `ADAPTERMESH_GATEWAY_<NAME>`."""

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from adaptermesh.rpc.credentials import Credentials
from adaptermesh.rpc.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """What the gateway reads from the environment."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_GATEWAY_")

    port: int = Field(default=7700, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    router: str = Field(
        default="127.0.0.1:7701",
        min_length=1,
        description="gRPC target of the routers: host:port, or a DNS name or an ipv4: list of several.",
    )
    store: str = Field(
        default="127.0.0.1:7702",
        min_length=1,
        description="gRPC target of the adapter store; asked for the list of models only.",
    )
    store_key: SecretStr = Field(
        default=SecretStr(""),
        description="API key for the store where callers show none, for the list of models. "
        "Empty: the store asks for none.",
    )
    authentication: Credentials = Field(
        default=Credentials.NONE,
        description="What callers must show. none: nothing, x-tenant-id is believed. keys: an API key of the "
        "store, and they use what their tenant may use.",
    )
    key_cache_seconds: float = Field(
        default=1.0,
        ge=0,
        description="How long a key counts as valid without asking the store again, in seconds.",
    )
    key_grace_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How long it does so while the store can't be asked, in seconds.",
    )
    default_deadline_seconds: float = Field(
        default=600.0, gt=0, description="Bound on a request whose caller set no deadline, in seconds."
    )
    router_timeout_seconds: float = Field(
        default=5.0, gt=0, description="Bound on one call to a router, in seconds."
    )
    store_timeout_seconds: float = Field(
        default=10.0, gt=0, description="Bound on one call to the store, in seconds."
    )
    admission_timeout_seconds: float = Field(
        default=15.0,
        gt=0,
        description="How long a worker may take to admit a request before another one is asked, in seconds.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=16,
        description="Workers that one request may try before the first has admitted it.",
    )
    max_requests_in_flight: int = Field(
        default=1024, ge=1, description="Requests served at once; more are refused with a time to retry."
    )
    max_worker_channels: int = Field(
        default=64, ge=1, description="Connections to workers that are kept open while nothing uses them."
    )
    health_interval_seconds: float = Field(
        default=1.0,
        gt=0,
        description="Time between two looks at the router for the health check, in seconds.",
    )

    @property
    def authenticates(self) -> bool:
        """Whether callers must show an API key."""
        return self.authentication is Credentials.KEYS
