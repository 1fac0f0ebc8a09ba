"""One request on its way through the engine."""

import enum
from dataclasses import dataclass, field

from adaptermesh.worker.engine.kv import BlockTable
from adaptermesh.worker.engine.penalties import TokenHistory
from adaptermesh.worker.engine.prefix_cache import BlockKeys
from adaptermesh.worker.engine.request import FinishReason, Listener, Outcome, Request, Timeline
from adaptermesh.worker.engine.slots import BASE_SLOT
from adaptermesh.worker.engine.text import TextStream
from adaptermesh.worker.engine.traits import NEVER, Traits


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its tokens, its place in the cache and in the batch.

    Attributes:
        tokens: The prompt, then what was generated. An adapter's virtual tokens are not among them.
        computed: Tokens whose keys and values are in the cache, the virtual ones in front of the prompt too.
        limit: How many tokens end the sequence: `max_tokens` or the context, whichever comes first.
        context: Longest sequence that there may be, virtual tokens included.
        fill_from: The first virtual token whose given keys and values are not in the sequence's blocks yet;
            None if all are, or none are given. They count as computed and are written with the next step.
        slot: The adapter's device slot while running; BASE_SLOT for the base.
        overtaken: Requests that joined past this one because its adapter could not.
        level: Priority with which it joined the batch, aged as the waiting queue does.
        charged: Tokens of the prompt that its tenant was charged for.
        early: It got its row before its adapter was whole, and its first chunk is not computed yet.
        seed: Of the request, or drawn when it was submitted.
        history: Token counts of a request with penalties; None for all others.
        traits: Of its adapter; None until its manifest is here.
        activation: The first token that the adapter acts on; those before it are computed by the base alone.
        keys: What its full blocks are found by in the prefix cache; there are none before the traits.
        scored: Tokens of the prompt whose log probabilities need not be told: they were, or nobody asked. The
            first one has none.
    """

    request: Request
    listener: Listener
    tokens: list[int]
    limit: int
    seed: int
    text: TextStream
    timeline: Timeline
    arrival: int
    table: BlockTable = field(default_factory=BlockTable)
    state: SequenceState = SequenceState.WAITING
    computed: int = 0
    slot: int = BASE_SLOT
    overtaken: int = 0
    history: TokenHistory | None = None
    level: int = 0
    charged: int = 0
    early: bool = False
    traits: Traits | None = None
    activation: int = 0
    context: int = NEVER
    fill_from: int | None = None
    keys: BlockKeys = field(init=False)
    scored: int = field(init=False)

    def __post_init__(self) -> None:
        if self.request.digest is None:
            self.learn(Traits())
        self.scored = self.prompt_tokens if self.request.sampling.prompt_logprobs is None else 1

    def learn(self, traits: Traits) -> None:
        """The adapter's manifest has come."""
        self.traits = traits
        self.activation = traits.activation(self.request.prompt_ids)
        seam = traits.prompt_seam(self.prompt_tokens)
        ending = None if seam is None else (traits.virtual + seam, self.prompt_tokens)
        self.keys = BlockKeys(
            self.request.digest, self.request.tenant, self.activation, traits.virtual, ending
        )
        self.limit = min(self.limit, self.context - traits.virtual)

    @property
    def virtual(self) -> int:
        """Tokens that the adapter puts in front of the prompt; 0 as long as that is not known."""
        return 0 if self.traits is None else self.traits.virtual

    @property
    def given(self) -> int:
        """Those of them that are not computed."""
        return 0 if self.traits is None else self.traits.given

    @property
    def shift(self) -> int:
        """How far the positions of its tokens are before their places in the cache."""
        return 0 if self.traits is None else self.traits.shift

    @property
    def fits(self) -> bool:
        """Whether the context has room for the virtual tokens, the prompt and one token of output."""
        return self.limit > self.prompt_tokens

    def begin(self, shared: int) -> None:
        """It has joined with its first `shared` tokens in the cache."""
        self.computed = max(shared, self.given)
        self.fill_from = shared if shared < self.given else None

    @property
    def digest(self) -> str | None:
        return self.request.digest

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def length(self) -> int:
        """Tokens in all, virtual ones included."""
        return self.virtual + len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return self.length - self.computed

    @property
    def decodes(self) -> bool:
        """Whether, while it runs, its next step is one token; the last of a prompt counts as such."""
        return self.pending == 1 and not self.early

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose log probabilities are still wanted."""
        return self.prompt_tokens - self.scored

    @property
    def remaining(self) -> int:
        """Tokens that may still be computed or generated; what draining a slot weighs."""
        return self.virtual + self.limit - self.computed

    def outcome(self, reason: FinishReason) -> Outcome:
        return Outcome(reason, self.prompt_tokens, self.output_tokens, self.timeline)
