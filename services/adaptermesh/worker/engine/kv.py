"""The paged KV cache: which blocks a sequence owns, and the tensor they live in.

Block 0 is never given out. It stays zero and pads the block tables of short rows. Behind the last block is a
scratch block, which nobody reads: rows that fill up a captured step write there. A block is zeroed when it
is given out: what another sequence left there (an infinity, say) is masked by adding minus infinity, which
would make NaN of it, so it must be gone.

Full blocks can be shared: sequences that begin with the same tokens hold the same blocks, none of which is
ever written again. A cached block that nobody holds counts as free; uncached ones are given out before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from adaptermesh.worker.engine.prefix_cache import PrefixCache
from adaptermesh.worker.engine.upload import to_device

PADDING_BLOCK = 0


@dataclass(frozen=True, slots=True)
class KvShape:
    """The geometry of the cache."""

    layers: int
    kv_heads: int
    head_dim: int
    blocks: int
    block_tokens: int


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens. The cache has seen the first `kept` of them."""

    blocks: list[int] = field(default_factory=list)
    kept: int = 0


class BlockAllocator:
    """Counts and hands out blocks; lowest number first, so that a small load touches little memory."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.total = blocks
        self._free = list(range(blocks, PADDING_BLOCK, -1))
        self._users = [0] * (blocks + 1)
        self._cache = PrefixCache()
        self._dirty: list[int] = []

    @property
    def free(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return len(self._free) + self._cache.resting

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def reclaimable(self) -> int:
        """Free blocks that are cached."""
        return self._cache.resting

    def missing(self, table: BlockTable, tokens: int) -> int:
        """Blocks that the table lacks to hold that many tokens."""
        return max(0, -(-tokens // self.block_tokens) - len(table.blocks))

    def has_room(self, tokens: int, keys: Sequence[bytes]) -> bool:
        """Whether a sequence that begins with what `keys` stand for could hold that many tokens now."""
        found = self._cache.find(keys)
        resting = sum(self._cache.is_resting(block) for block in found)
        return -(-tokens // self.block_tokens) - len(found) <= self.free - resting

    def share(self, table: BlockTable, keys: Sequence[bytes]) -> int:
        """Gives an empty table the longest cached run of `keys`; returns its tokens."""
        for block in self._cache.find(keys):
            if self._users[block] == 0:
                self._cache.wake(block)
            self._users[block] += 1
            table.blocks.append(block)
        table.kept = len(table.blocks)
        return table.kept * self.block_tokens

    def keep(self, table: BlockTable, keys: Sequence[bytes]) -> None:
        """Caches the table's first blocks, one a key; all their tokens are computed."""
        for index in range(table.kept, len(keys)):
            self._cache.add(keys[index], table.blocks[index])
        table.kept = max(table.kept, len(keys))

    def grow(self, table: BlockTable, tokens: int) -> bool:
        """Makes the table hold that many tokens; False, and nothing changed, if blocks are short."""
        need = self.missing(table, tokens)
        if need > self.free:
            return False
        for _ in range(need):
            block = self._free.pop() if self._free else self._cache.reclaim()
            self._users[block] = 1
            table.blocks.append(block)
            self._dirty.append(block)
        return True

    def release(self, table: BlockTable) -> None:
        """Takes all blocks of the table back.

        The last block rests first and so is reclaimed first: without the ones before it, it can't be found.
        """
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if self._users[block] > 0:
                continue
            if block in self._cache:
                self._cache.rest(block)
            else:
                self._free.append(block)
        table.blocks.clear()
        table.kept = 0

    def take_dirty(self) -> list[int]:
        """Blocks given out since the last call: they must be zeroed before they are used."""
        dirty, self._dirty = self._dirty, []
        return dirty


class KvCache:
    """The keys and values of all layers.

    `data`: [layers, 1 + blocks + 1, block_tokens, 2 * kv_heads, head_dim]; the keys' heads come first. Keys
    and values of a token lie together, so that one write and one gather a layer move both.
    """

    def __init__(self, shape: KvShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        # zeros: the operating system gives the pages when they are first touched.
        self.data = torch.zeros(
            (shape.layers, shape.blocks + 2, shape.block_tokens, 2 * shape.kv_heads, shape.head_dim),
            dtype=dtype,
            device=device,
        )
        self._by_block = self.data.flatten(3).flatten(2).unbind(0)
        self._by_token = self.data.flatten(1, 2).unbind(0)
        self._keys = self.data[:, :, :, : shape.kv_heads].unbind(0)
        self._values = self.data[:, :, :, shape.kv_heads :].unbind(0)

    @property
    def size_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    @property
    def block_bytes(self) -> int:
        return self.size_bytes // self.data.shape[1]

    @property
    def scratch_block(self) -> int:
        return self.shape.blocks + 1

    def zero(self, blocks: list[int]) -> None:
        """Zeroes blocks in every layer."""
        if blocks:
            self.data.index_fill_(1, to_device(blocks, self.data.device), 0.0)

    def keys(self, layer: int) -> torch.Tensor:
        """[pages, block_tokens, kv_heads, head_dim], a view."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """[pages, block_tokens, kv_heads, head_dim], a view."""
        return self._values[layer]

    def write(self, layer: int, places: torch.Tensor, kv: torch.Tensor) -> None:
        """Stores tokens.

        places: [tokens] int64, block * block_tokens + offset. kv: [tokens, 2 * kv_heads, head_dim].
        """
        self._by_token[layer].index_copy_(0, places, kv)

    def write_apart(self, layer: int, places: torch.Tensor, kv: torch.Tensor) -> None:
        """Stores tokens in the layout of the kernels in C++, in which a block holds one head after the other.

        Of each its keys, [head_dim, block_tokens], then its values, [block_tokens, head_dim]. Arguments as of
        `write`.
        """
        shape = self.shape
        size, dim = shape.block_tokens, shape.head_dim
        keys, values = self.data[layer].view(-1, shape.kv_heads, 2, size * dim).unbind(2)
        blocks, rows = places // size, places % size
        keys.unflatten(2, (dim, size))[blocks, :, :, rows] = kv[:, : shape.kv_heads]
        values.unflatten(2, (size, dim))[blocks, :, rows] = kv[:, shape.kv_heads :]

    def read(self, layer: int, blocks: torch.Tensor, rows: int) -> torch.Tensor:
        """Gathers rows of blocks: [rows * n] int64 -> [rows, n * block_tokens, 2 * kv_heads, head_dim]."""
        shape = self.shape
        found = self._by_block[layer].index_select(0, blocks)
        return found.view(rows, -1, 2 * shape.kv_heads, shape.head_dim)
