"""What the engine says about itself."""

from dataclasses import dataclass

from adaptermesh.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class ResidencyView:
    """One adapter version that is here. `requests` wait for it or run with it."""

    digest: str
    tier: Tier
    pinned: bool
    requests: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A moment's counts. An adapter that is resident and idle is listed too."""

    running: int
    waiting: int
    waiting_tokens: int
    kv_used_tokens: int
    kv_total_tokens: int
    residencies: tuple[ResidencyView, ...]
