"""What the engine says about itself."""

from dataclasses import dataclass

from adaptermesh.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class ResidencyView:
    """One adapter version that is here. `requests` wait for it or run with it.

    `device_bytes`: what its weights take in the computing dtype; 0 until it was in memory.
    """

    digest: str
    tier: Tier
    pinned: bool
    requests: int
    size_bytes: int
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TierBudgets:
    """What the adapters take of each tier, and what they may take.

    Attributes:
        device_used_bytes: Memory that the ops hold on the device.
        device_used_slots: Slots that are taken.
        device_budget_bytes: What the weights of the adapters in slots may take; 0: only slots bound them.
        host_used_bytes: Host memory, that of arriving adapters included.
    """

    device_used_bytes: int = 0
    device_used_slots: int = 0
    host_used_bytes: int = 0
    host_budget_bytes: int = 0
    disk_used_bytes: int = 0
    disk_budget_bytes: int = 0
    device_budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A moment's counts. An adapter that is resident and idle is listed too.

    Attributes:
        kv_used_tokens: Room held by running requests; blocks that are only cached are not in it.
        kv_cached_tokens: Tokens in cached blocks that nobody holds; they are given up when room is short.
        kv_total_bytes: All memory of the KV cache.
        kv_used_bytes: The part of it that running requests hold.
        kv_cached_bytes: The part of it that is only cached.
        prefix_query_tokens: Tokens of all prompts that were looked up in the prefix cache so far.
        prefix_hit_tokens: Those of them that it had.
    """

    running: int
    waiting: int
    waiting_tokens: int
    kv_used_tokens: int
    kv_total_tokens: int
    residencies: tuple[ResidencyView, ...]
    kv_cached_tokens: int = 0
    kv_total_bytes: int = 0
    kv_used_bytes: int = 0
    kv_cached_bytes: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    tiers: TierBudgets = TierBudgets()
