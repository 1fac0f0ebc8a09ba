"""What is asked: prompts of random tokens, who asks for which adapter, and how many at once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.adapter_files import adapter_name

_SEED = 7


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the scenarios are. Tokens are those of one request."""

    rows: int = 16
    """Requests of the standard workload."""
    adapters: int = 8
    """Adapters of the standard workload, and device slots of the scenario with too many."""
    prompt_tokens: int = 64
    output_tokens: int = 64
    many_rows: int = 64
    """Rows of the large batch, each with an adapter of its own."""
    registered: int = 1000
    slots: int = 64
    stream: int = 96
    """Requests of one pass over the registered adapters."""
    clients: int = 8
    """Who each ask again as soon as they are answered."""
    asked: int = 64
    """Requests of all clients together in one round."""
    asked_tokens: int = 32
    """Output tokens of those."""
    sequential: int = 24
    """Requests one after the other, to see what a switch costs."""
    sequential_tokens: int = 16
    cold: int = 40
    """Cold switches of one round."""
    catalogue: int = 100_000
    """Adapters of the store's own scenario, with three versions each."""
    lookups: int = 1000
    """Refs resolved in one round."""
    searches: int = 100
    """Pages of each kind of search in one round."""
    events: int = 10_000
    downloads: int = 6
    """Downloads of each client in one round."""
    transfers: int = 25
    """Uploads, and downloads, that run together."""
    transfer_bytes: int = 100_000_000
    """Of each of them."""
    checked: int = 8
    """Answers of a round that are compared where no peer runs the whole workload."""
    checked_tokens: int = 8

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + max(self.output_tokens, self.asked_tokens, self.sequential_tokens)

    @property
    def files(self) -> int:
        """Adapters with weights of their own. More registered ones repeat these under other names."""
        return max(self.many_rows, 2 * self.adapters)


TINY = Scale(
    rows=2,
    adapters=2,
    prompt_tokens=8,
    output_tokens=4,
    many_rows=4,
    registered=20,
    slots=4,
    stream=6,
    clients=2,
    asked=4,
    asked_tokens=2,
    sequential=2,
    sequential_tokens=2,
    cold=2,
    catalogue=200,
    lookups=20,
    searches=4,
    events=50,
    downloads=1,
    transfers=2,
    transfer_bytes=4_000_000,
    checked=2,
    checked_tokens=2,
)
"""For trying the harness; its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request; `adapter` None is the bare base."""

    prompt: tuple[int, ...]
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Workload:
    """`in_flight` requests are outstanding at any time; 0 means all of them at once."""

    items: tuple[Item, ...]
    output_tokens: int
    in_flight: int = 0

    @property
    def tokens(self) -> int:
        """Output tokens of all requests."""
        return len(self.items) * self.output_tokens

    def to_json(self) -> dict[str, object]:
        return {
            "items": [{"prompt": item.prompt, "adapter": item.adapter} for item in self.items],
            "output_tokens": self.output_tokens,
            "in_flight": self.in_flight,
        }


@dataclass(frozen=True, slots=True)
class Prompts:
    """Fresh random prompts for each round and label: no cache of what was asked before helps anyone."""

    vocab_size: int
    tokens: int

    def draw(self, label: str, round_number: int, adapters: Sequence[str | None]) -> tuple[Item, ...]:
        """One request for each entry of `adapters`."""
        rng = random.Random(f"{_SEED} {label} {round_number}")
        return tuple(
            Item(tuple(rng.randrange(3, self.vocab_size) for _ in range(self.tokens)), adapter)
            for adapter in adapters
        )


def cycled(count: int, adapters: int) -> list[str | None]:
    """`count` requests over the first `adapters` adapters in turn."""
    return [adapter_name(index % adapters) for index in range(count)]


def uniform(count: int, adapters: int, round_number: int) -> list[str | None]:
    """`count` requests, each for any of the first `adapters` adapters."""
    rng = random.Random(f"{_SEED} uniform {round_number}")
    return [adapter_name(rng.randrange(adapters)) for _ in range(count)]


def zipf(count: int, registered: int, files: int, round_number: int) -> list[str | None]:
    """`count` requests; the k-th most popular of `registered` adapters is asked for in proportion to 1/k."""
    rng = random.Random(f"{_SEED} zipf {round_number}")
    weights = [1.0 / (rank + 1) for rank in range(registered)]
    drawn = rng.choices(range(registered), weights, k=count)
    return [copy_name(index, files) for index in drawn]


def copy_name(index: int, files: int) -> str:
    """The name of the index-th registered adapter, of which only `files` have weights of their own."""
    name = adapter_name(index % files)
    return f"{name}#{index // files}" if index >= files else name


def weights_of(name: str) -> str:
    """The adapter that has the weights of a registered one."""
    return name.partition("#")[0]
