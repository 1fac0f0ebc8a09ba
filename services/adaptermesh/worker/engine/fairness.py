"""Fair shares between tenants: how much each one was served, in weighted tokens.

Source: the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(arXiv:2401.00588), algorithm 2. The tenant with the smallest counter goes first. A tenant that had nothing
waiting is lifted to the smallest counter of those that wait, so that nobody saves up a share while idle.
Unlike there, a prompt is charged chunk by chunk as the chunks enter a step; what the cache knew, and what is
computed anew after a preemption, costs nothing.
"""

from collections.abc import Collection
from collections.abc import Set as AbstractSet

from adaptermesh.worker.engine.config import EngineConfig


class TenantCounters:
    """The counters of all tenants that are remembered: those with requests here and some idle ones."""

    def __init__(self, config: EngineConfig) -> None:
        self._prompt_weight = config.prompt_token_weight
        self._output_weight = config.output_token_weight
        self._limit = config.tenant_counters
        self._served: dict[str, float] = {}
        self._last = ""

    def __len__(self) -> int:
        return len(self._served)

    def served(self, tenant: str) -> float:
        """Weighted tokens, comparable between tenants only."""
        return self._served.get(tenant, 0.0)

    def charge(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        cost = self._prompt_weight * prompt_tokens + self._output_weight * output_tokens
        self._served[tenant] = self.served(tenant) + cost

    def join(self, tenant: str, waiting: Collection[str]) -> None:
        """A tenant that had nothing waiting gets something; `waiting` are the other tenants that have."""
        floor = min(self.served(other) for other in waiting) if waiting else self.served(self._last)
        self._served[tenant] = max(self.served(tenant), floor)

    def leave(self, tenant: str) -> None:
        """A tenant has nothing waiting any more. While nobody waits, the last one to leave is the measure."""
        self._last = tenant

    def full(self) -> bool:
        return len(self._served) >= self._limit

    def forget(self, busy: AbstractSet[str]) -> None:
        """Halves the table: the idle tenants with the smallest counters go, who lose and win the least."""
        kept = busy | {self._last}
        idle = sorted((tenant for tenant in self._served if tenant not in kept), key=self.served)
        for tenant in idle[: len(self._served) - self._limit // 2]:
            del self._served[tenant]
