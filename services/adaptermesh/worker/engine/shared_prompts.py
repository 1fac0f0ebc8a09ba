"""Prompts that are computed just now: who begins with the same tokens waits for them, and computes the rest.

Without this, requests that come together, such as the n answers to one prompt or a burst with one system
prompt, would all compute what they share: it can be found in the prefix cache only when it is there.
"""

from collections.abc import Iterable

from adaptermesh.worker.engine.sequence import Sequence


class PromptsUnderWay:
    """The keys of blocks that running rows are about to fill.

    Nobody waits for ever: a row that computes its prompt goes on, or leaves and is here no more.
    """

    def __init__(self, rows: Iterable[Sequence], block_tokens: int) -> None:
        """`rows`: those whose prompts are computed in steps, without those that wait for their adapter."""
        self._block_tokens = block_tokens
        self._keys: set[bytes] = set()
        for row in rows:
            self.add(row)

    def add(self, row: Sequence) -> None:
        """A row that has joined."""
        size = self._block_tokens
        if row.pending > 1:
            blocks = row.length // size
            self._keys.update(row.keys.first(blocks, row.tokens, size)[row.table.kept :])

    def shares(self, sequence: Sequence) -> bool:
        """Whether some block that a waiting request could use is under way."""
        if not self._keys:
            return False
        size = self._block_tokens
        # The last token is computed by itself in any case: its logits are needed.
        blocks = (sequence.length - 1) // size
        return not self._keys.isdisjoint(sequence.keys.first(blocks, sequence.tokens, size))
