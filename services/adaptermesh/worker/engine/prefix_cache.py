"""Full KV blocks that may serve again: found by what they hold, reclaimed when blocks are short.

A block's key is a chained hash: of the key before it and of its own tokens, the first one of the adapter's
digest (or the base) and the tenant. Equal keys mean equal tokens from the start, by the same weights, for the
same tenant, so a name that points to new weights, or another tenant, can't meet an old block.

An adapter that is activated by tokens computes what is before them as the base does. The blocks before the
one with the first adapted token so have the base's keys, and are shared with it. That one and all later ones
are the adapter's own; its key says from which token on, for the tokens behind a block decide about that too.

An adapter that acts on the ends of a prompt computes the same tokens otherwise in a longer prompt. The keys
of the blocks from there on say how long the prompt is.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_VIRTUAL = -1
"""Stands for a virtual token; no token of a prompt is negative."""


class BlockKeys:
    """The keys of one sequence's full blocks, made once each, when they are first asked for."""

    __slots__ = ("_activation", "_chain", "_ending", "_own", "_virtual")

    def __init__(
        self,
        digest: str | None,
        tenant: str,
        activation: int = 0,
        virtual: int = 0,
        ending: tuple[int, int] | None = None,
    ) -> None:
        """`activation`: the first token that the adapter acts on. `virtual`: tokens that it puts in front.

        `ending`: the token from which on the length of the prompt matters, and that length.
        """
        self._ending = ending
        self._virtual = virtual
        self._own = _root(digest, tenant)
        self._activation = activation
        self._chain = [_root(None, tenant) if activation else self._own]

    def first(self, blocks: int, tokens: Sequence[int], block_tokens: int) -> list[bytes]:
        """Keys of that many blocks.

        `tokens`, behind the virtual ones, fills them all and only ever grows from call to call.
        """
        for index in range(len(self._chain) - 1, blocks):
            start, end = (max(0, block_tokens * at - self._virtual) for at in (index, index + 1))
            # The digest says what the virtual tokens are.
            held = [_VIRTUAL] * (block_tokens - (end - start)) + list(tokens[start:end])
            before = self._chain[-1]
            if self._ending is not None and index == self._ending[0] // block_tokens:
                before = _hash(b"prompt of %d " % self._ending[1] + before)
            if self._activation and index == self._activation // block_tokens:
                before = _hash(b"activated %d " % self._activation + self._own + before)
            self._chain.append(_hash(before + array("q", held).tobytes()))
        return self._chain[1 : blocks + 1]


class PrefixCache:
    """Which block holds what. A block rests here when nobody uses it, the longest unused one first.

    Bounded by the number of blocks: a key is forgotten when its block is reclaimed.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    @property
    def resting(self) -> int:
        """Blocks that are cached and in nobody's use."""
        return len(self._resting)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached run of keys from the first one."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, key: bytes, block: int) -> None:
        """Makes a block in use known; one that holds what another already holds stays unknown."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def is_resting(self, block: int) -> bool:
        return block in self._resting

    def rest(self, block: int) -> None:
        """The last user of a known block is gone."""
        self._resting[block] = None

    def wake(self, block: int) -> None:
        """A resting block is in use again."""
        del self._resting[block]

    def reclaim(self) -> int:
        """Gives up the block that has rested longest; there must be one."""
        block, _ = self._resting.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block


def _root(digest: str | None, tenant: str) -> bytes:
    """What the chain of some weights begins with."""
    weights = "base" if digest is None else f"adapter {digest}"
    # The length in front keeps the two names apart, whatever they contain.
    return _hash(f"{len(weights)} {weights} {tenant}".encode())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
