"""What workers, routers and the gateway say of themselves, as the SDK shows it: plain frozen records."""

import datetime
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Residency:
    """Where one version is on a worker. `tier` is a name: "disk", "host" or "device".

    `device_bytes` is what its weights take on the device; 0 until it was in the worker's memory.
    """

    digest: str
    tier: str
    pinned: bool
    requests: int
    size_bytes: int
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that a worker's adapters and its KV cache hold, and may hold.

    `host_used_bytes` includes what is reserved for arriving adapters. `kv_cached_bytes` are in nobody's use:
    prompts that begin alike find them there until room is short. `device_budget_bytes` is 0 where the slots
    alone bound what is on the device.
    """

    device_used_bytes: int = 0
    device_used_slots: int = 0
    host_used_bytes: int = 0
    host_budget_bytes: int = 0
    disk_used_bytes: int = 0
    disk_budget_bytes: int = 0
    kv_used_bytes: int = 0
    kv_cached_bytes: int = 0
    kv_total_bytes: int = 0
    device_budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is. `budgets` is None if the worker does not tell."""

    running_requests: int = 0
    waiting_requests: int = 0
    waiting_tokens: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    budgets: Budgets | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker, as a router or the worker itself describes it. `state` is "ready" or "draining".

    `base_bytes` is what the base model's weights take there; 0 if it does not tell.
    """

    worker_id: str
    address: str
    device: str
    base_model_id: str
    base_digest: str
    device_slots: int
    state: str
    load: Load
    residencies: tuple[Residency, ...] = field(default=())
    booked_requests: int = 0
    base_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """How far a router has followed the store's change feed."""

    feed_position: int
    feed_head: int
    feed_connected: bool
    versions: int
    routes: int


@dataclass(frozen=True, slots=True)
class Model:
    """Something that can be asked for: `id` is "base" or `namespace/name:v3`."""

    id: str
    digest: str
    base_model_id: str
    task: str
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FeedStatus:
    """How far the store's change feed is, and how far back it goes.

    Changes up to `trimmed_position` are gone. `oldest_commit_time` is that of the oldest one that is there,
    None if there is none. `watchers` are those of the store that answered.
    """

    feed_id: str
    head_position: int
    trimmed_position: int
    oldest_commit_time: datetime.datetime | None
    watchers: int
