"""What can be set on a router."""

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from adaptermesh.rpc.settings import ServiceSettings


class RouterSettings(ServiceSettings):
    """Read from `ADAPTERMESH_ROUTER_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_ROUTER_")

    port: int = Field(default=7701, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    store: str = Field(default="127.0.0.1:7702", description="host:port of the adapter store.")
    store_key: SecretStr = Field(
        default=SecretStr(""),
        description="API key for the store, an operator's reader is enough. Empty: the store asks for none.",
    )
    startup_wait_seconds: float = Field(
        default=5.0,
        ge=0,
        description="At start: how long to wait for the catalogue before serving without one, in seconds.",
    )
    feed_heartbeat_timeout_seconds: float = Field(
        default=15.0,
        gt=0,
        description="The change feed is taken to be dead after this many seconds without a message.",
    )
    feed_backoff_initial_seconds: float = Field(
        default=0.1, gt=0, description="First delay before the feed is opened again, in seconds."
    )
    feed_backoff_max_seconds: float = Field(
        default=2.0, gt=0, description="Longest delay before the feed is opened again, in seconds."
    )
    snapshot_timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        description="Longest time that one snapshot of the catalogue may take, in seconds.",
    )
    catch_up_seconds: float = Field(
        default=1.0,
        gt=0,
        description="Longest wait for the store before a name is said to be unknown, in seconds.",
    )
    feed_wait_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Longest wait for the feed position that a caller asked for, in seconds.",
    )
    worker_timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        description="A worker is taken to be gone after this many seconds without a report.",
    )
    booking_seconds: float = Field(
        default=10.0,
        gt=0,
        description="A booking that its worker has not confirmed is forgotten after this many seconds.",
    )
    base_return_seconds: float = Field(
        default=120.0,
        ge=0,
        description="How long a base without workers is expected to be served again, in seconds.",
    )
    startup_grace_seconds: float = Field(
        default=5.0,
        ge=0,
        description="After start: how long every base is expected to get its workers back, in seconds.",
    )
    retry_after_seconds: float = Field(
        default=1.0, gt=0, description="The delay that a refusal tells the caller to wait, in seconds."
    )
