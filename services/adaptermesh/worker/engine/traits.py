"""What an adapter asks of the sequences that use it, known as soon as its manifest is."""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptermesh.artifact.manifest import Manifest

NEVER = 2**62
"""The activation of a prompt without the invocation: no token is adapted, neither of it nor of the output."""


@dataclass(frozen=True, slots=True)
class Traits:
    """`invocation`: the tokens that activate the adapter; empty for one that acts on every token."""

    invocation: tuple[int, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> "Traits":
        activation = manifest.activation
        return cls(() if activation is None else activation.invocation_tokens)

    def activation(self, prompt_ids: Sequence[int]) -> int:
        """The position of the first token that is adapted: where the last invocation begins.

        Source: peft 0.21, `calculate_alora_offsets`. What is generated later changes nothing.
        """
        wanted = self.invocation
        if not wanted:
            return 0
        last = len(prompt_ids) - len(wanted)
        starts = (at for at in range(last, -1, -1) if prompt_ids[at] == wanted[0])
        return next((at for at in starts if tuple(prompt_ids[at : at + len(wanted)]) == wanted), NEVER)
