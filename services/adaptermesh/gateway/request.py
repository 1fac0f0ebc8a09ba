"""A request as the gateway sees it once it is known to be well-formed."""

import math
from dataclasses import dataclass

from adaptermesh.core.refs import BASE
from adaptermesh.core.roles import MESH_TENANT
from adaptermesh.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Target:
    """What serves the request: a ref, else a task, else the bare base model."""

    task: str = ""
    ref: str = ""

    @property
    def asked(self) -> str:
        """What the caller named, for reports."""
        return self.ref or self.task or BASE


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom an API key stands for."""

    tenant: str
    """"*" for an operator of the mesh."""
    namespaces: tuple[str, ...] = ()
    """The key is good in these only. Empty: in all."""
    max_requests_per_minute: int = 0
    """Of the tenant; 0 is no bound."""
    expire_time: float = math.inf
    """In seconds since the Unix epoch."""

    @property
    def is_operator(self) -> bool:
        return self.tenant == MESH_TENANT


@dataclass(frozen=True, slots=True)
class Caller:
    """What the request's metadata says."""

    request_id: str
    tenant: str
    target: Target
    cohort_key: str = ""
    """Empty means the request id."""
    min_feed_position: int = 0
    identity: Identity | None = None
    """Who the caller has shown to be; None: nobody was asked, and everything may be used."""

    @property
    def is_restricted(self) -> bool:
        """Whether only what its tenant may use may be used."""
        identity = self.identity
        return identity is not None and not (identity.is_operator and not identity.namespaces)


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input: exactly one of the three is not None."""

    text: str | None = None
    chat: tuple[ChatTurn, ...] | None = None
    token_ids: tuple[int, ...] | None = None

    @property
    def operation(self) -> str:
        """The GenAI conventions' name of what is asked for."""
        return "text_completion" if self.chat is None else "chat"

    def estimated_tokens(self) -> int:
        """A guess for the router's load figures: four bytes a token."""
        if self.token_ids is not None:
            return len(self.token_ids)
        if self.chat is not None:
            return sum(4 + len(turn.content) // 4 for turn in self.chat)
        return max(1, len(self.text or "") // 4)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A whole request to generate."""

    caller: Caller
    prompt: Prompt
    sampling: SamplingParams
    base_model: str = ""
    """Name or digest of the base the caller relies on. Empty means any."""
    priority: int = 0
    n: int = 1
    """Answers to the same prompt."""
