"""What is read of a blob, wherever it is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptermesh.core.errors import Code, MeshError, Reason


@dataclass(frozen=True, slots=True)
class HeadedRange:
    """Some bytes of a blob, and what is to be in front of them."""

    offset: int
    size: int
    head: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + self.size


class BlobReader(Protocol):
    """An open blob."""

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    @property
    def block_bytes(self) -> int:
        """How much is best read at once."""
        ...

    async def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; raises MeshError DATA_CORRUPT if they aren't there."""
        ...

    async def read_behind(self, ranges: Sequence[HeadedRange]) -> list[bytes]:
        """Ranges that follow one another, each behind its head; raises MeshError DATA_CORRUPT."""
        ...


def corrupt_blob(digest: str, message: str) -> MeshError:
    """DATA_LOSS (DATA_CORRUPT)."""
    return MeshError(
        Code.DATA_LOSS, Reason.DATA_CORRUPT, f"blob {digest}: {message}", metadata={"digest": digest}
    )
