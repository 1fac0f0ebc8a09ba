"""What an adapter asks of the sequences that use it, known as soon as its manifest is."""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.ops import KV_PREFIX, PROMPT, REFT, START

NEVER = 2**62
"""The activation of a prompt without the invocation: no token is adapted, neither of it nor of the output."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What is the same for all sequences of an adapter.

    Attributes:
        invocation: The tokens that activate it; empty for one that acts on every token.
        virtual: Tokens that it puts in front of every prompt, which have the first positions.
        given: Those of them whose keys and values are given and not computed: all or none.
        shift: How far the positions of all other tokens are before their places in the cache.
        ends: How many tokens at the beginning of a prompt and at its end are computed otherwise than others.
    """

    invocation: tuple[int, ...] = ()
    virtual: int = 0
    given: int = 0
    shift: int = 0
    ends: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, manifest: Manifest) -> "Traits":
        activation = manifest.activation
        shapes = {tensor.name: tensor.shape for tensor in manifest.tensors}
        virtual, given, shift, ends = 0, 0, 0, (0, 0)
        for module in manifest.modules:
            if module.op == PROMPT:
                virtual = shapes[module.tensors["E"]][0]
            elif module.op == KV_PREFIX:
                virtual = given = shapes[module.tensors["k"]][1]
                shift = given if (module.options or {}).get("positions") == START else 0
            elif module.op == REFT and module.options:
                ends = int(module.options["prefix"]), int(module.options["suffix"])
        return cls(() if activation is None else activation.invocation_tokens, virtual, given, shift, ends)

    def prompt_seam(self, prompt_tokens: int) -> int | None:
        """The token of a prompt from which on it matters how long the prompt is; None if it never does."""
        first, last = self.ends
        if last:
            return max(0, prompt_tokens - last)
        # What is generated is not at the beginning of the prompt, however short that is.
        return prompt_tokens if prompt_tokens < first else None

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
