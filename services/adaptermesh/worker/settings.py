"""Settings of a worker process, from the environment: `ADAPTERMESH_WORKER_<NAME>`."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from adaptermesh.rpc.settings import ServiceSettings
from adaptermesh.worker.adapter_stream import SourceConfig
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.reporter import ReporterConfig

_ENGINE = EngineConfig(disk_dir=Path())
_SOURCE = SourceConfig()
_REPORTER = ReporterConfig(routers=())


class WorkerSettings(ServiceSettings):
    """What a worker serves, where, and within which limits."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_WORKER_")

    port: int = Field(default=7710, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    advertise: str = Field(
        default="",
        description="host[:port] under which gateways reach this worker. Empty: the host it listens on, or "
        "the machine's name when it listens everywhere.",
    )
    model: str = Field(
        default="smollm2-135m-instruct",
        description="The base model: its id in the model cache, the hub name it was pulled by, or a folder.",
    )
    store: str = Field(default="127.0.0.1:7702", description="host:port of the adapter store.")
    store_key: SecretStr = Field(
        default=SecretStr(""),
        description="API key for the store, an operator's reader is enough. Empty: the store asks for none.",
    )
    routers: str = Field(
        default="127.0.0.1:7701",
        description="host:port of the routers, separated by commas. Each address behind a name is a router.",
    )
    device: str = Field(default=_ENGINE.device, description="Device to compute on: cpu, cuda or cuda:N.")
    dtype: str = Field(
        default=_ENGINE.dtype,
        description="Type to compute in: float32, bfloat16, float16, or auto (float32 on a CPU)",
    )
    load_format: str = Field(
        default=_ENGINE.load_format,
        description="auto loads the model's weights; dummy makes random ones from its config.json alone, to "
        "measure a shape: the answers mean nothing.",
    )
    forward: str = Field(
        default=_ENGINE.forward,
        description="The way through the base: native (kernels in C++, on a CPU), lean (few torch calls a "
        "layer), plain (the modules of transformers), or auto, the fastest of them that can be had.",
    )
    threads: int = Field(
        default=_ENGINE.threads,
        ge=0,
        description="CPU threads of a tensor operation. 0 means the cores that the process may use.",
    )
    quantization: str = Field(
        default=_ENGINE.quantization,
        description="none, or int8: the base's layers in 8 bits by torch, for models of the Llama "
        "architecture on a CPU with VNNI. No longer the base to the last digit; adapters stay exact. Whether "
        "it beats the native kernels depends on the CPU: measure it.",
    )
    max_batch_rows: int = Field(default=_ENGINE.max_batch_rows, ge=1, description="Requests in one step.")
    max_context_tokens: int = Field(
        default=_ENGINE.max_context_tokens,
        ge=2,
        description="Longest prompt and output together, in tokens. The model's own limit wins if smaller.",
    )
    step_tokens: int = Field(
        default=_ENGINE.step_tokens,
        ge=1,
        description="Tokens of one step; longer prompts are computed in chunks.",
    )
    early_tokens: int = Field(
        default=_ENGINE.early_tokens,
        ge=0,
        description="Tokens of prompts that may be computed while their adapters still arrive from the "
        "store; 0: a prompt waits for all of its adapter.",
    )
    scored_tokens: int = Field(
        default=_ENGINE.scored_tokens,
        ge=1,
        description="Prompt tokens that one step gives log probabilities of; their logits take memory.",
    )
    kv_tokens: int = Field(
        default=_ENGINE.kv_tokens, ge=1, description="Tokens that the KV cache holds in all."
    )
    prefix_cache: bool = Field(
        default=_ENGINE.prefix_cache,
        description="Keep computed tokens in the KV cache while there is room, for requests of the same "
        "tenant and adapter version that begin with them.",
    )
    device_slots: int = Field(
        default=_ENGINE.device_slots, ge=1, description="Adapters on the device at once."
    )
    device_bytes: int = Field(
        default=_ENGINE.device_bytes,
        ge=0,
        description="Bytes of adapters on the device, in the dtype that is computed in. 0: the slots alone "
        "bound them.",
    )
    host_bytes: int = Field(
        default=_ENGINE.host_bytes,
        ge=0,
        description="Bytes of adapters in host memory (page-locked on CUDA).",
    )
    disk_bytes: int = Field(
        default=_ENGINE.disk_bytes, ge=0, description="Bytes of adapters in the disk cache."
    )
    disk_dir: Path | None = Field(
        default=None,
        description="Folder of the disk cache, for this worker alone. Unset: <home>/workers/<port>/adapters.",
    )
    max_waiting: int = Field(
        default=_ENGINE.max_waiting, ge=1, description="Requests that may wait; more are refused."
    )
    fetch_concurrency: int = Field(
        default=_SOURCE.concurrency, ge=1, description="Adapters that are fetched from the store at once."
    )
    fetch_attempts: int = Field(
        default=_SOURCE.attempts,
        ge=1,
        description="Streams from the store that may break in a row without a byte of progress.",
    )
    fetch_timeout_seconds: float = Field(
        default=_SOURCE.timeout_seconds, gt=0, description="Longest time to fetch one adapter, in seconds."
    )
    fetch_stall_seconds: float = Field(
        default=_SOURCE.stall_seconds,
        gt=0,
        description="A stream from the store that brings nothing for this many seconds is opened again.",
    )
    registration_seconds: float = Field(
        default=5.0,
        ge=0,
        description="At start: how long to wait until the store knows the base model before serving without "
        "that, in seconds.",
    )
    report_interval_ms: float = Field(
        default=_REPORTER.interval_seconds * 1000,
        ge=1,
        description="Least time between two reports to a router, in milliseconds.",
    )
    heartbeat_seconds: float = Field(
        default=_REPORTER.heartbeat_seconds,
        gt=0,
        description="Longest time between two reports to a router, in seconds.",
    )
    resolve_seconds: float = Field(
        default=_REPORTER.resolve_seconds,
        gt=0,
        description="Time between two look-ups of the routers' names, in seconds.",
    )
    report_timeout_seconds: float = Field(
        default=_REPORTER.timeout_seconds,
        gt=0,
        description="A router that acknowledges no report for this many seconds is connected anew.",
    )

    def engine_config(self, port: int) -> EngineConfig:
        """The engine's limits; `port` is the one that was bound."""
        return EngineConfig(
            disk_dir=self.disk_dir or self.home / "workers" / str(port) / "adapters",
            device=self.device,
            dtype=self.dtype,
            load_format=self.load_format,
            forward=self.forward,
            kernel_dir=self.home / "kernels",
            threads=self.threads,
            quantization=self.quantization,
            max_batch_rows=self.max_batch_rows,
            max_context_tokens=self.max_context_tokens,
            step_tokens=self.step_tokens,
            early_tokens=self.early_tokens,
            scored_tokens=self.scored_tokens,
            kv_tokens=self.kv_tokens,
            prefix_cache=self.prefix_cache,
            device_slots=self.device_slots,
            device_bytes=self.device_bytes,
            host_bytes=self.host_bytes,
            disk_bytes=self.disk_bytes,
            max_waiting=self.max_waiting,
        )

    def source_config(self) -> SourceConfig:
        return SourceConfig(
            concurrency=self.fetch_concurrency,
            attempts=self.fetch_attempts,
            timeout_seconds=self.fetch_timeout_seconds,
            stall_seconds=self.fetch_stall_seconds,
        )

    def reporter_config(self) -> ReporterConfig:
        return ReporterConfig(
            routers=tuple(name.strip() for name in self.routers.split(",") if name.strip()),
            interval_seconds=self.report_interval_ms / 1000,
            heartbeat_seconds=self.heartbeat_seconds,
            resolve_seconds=self.resolve_seconds,
            timeout_seconds=self.report_timeout_seconds,
        )
