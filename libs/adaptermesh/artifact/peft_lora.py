"""peft's LoRA: A and B of each module as they are, and what DoRA and a bias on B add."""

from collections.abc import Iterator, Mapping, Sequence

from typing_extensions import override

from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.peft_models import LoraConfig
from adaptermesh.artifact.peft_plan import PREFIX, Reader
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.pieces import lowrank, vector, width_out
from adaptermesh.artifact.plan import Entries, Piece, Shape
from adaptermesh.artifact.sites import EDGES, EMBED, HEAD, Site

_EMBEDDING = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}


class LoraReader(Reader):
    """`lora_A` [r, in] and `lora_B` [out, r]; of a DoRA the magnitude [out]; of lora_bias the bias [out].

    Those of the embeddings have names of their own: `lora_embedding_A` [r, vocabulary], `lora_embedding_B`.
    """

    method = "LoRA"

    def __init__(self, config: LoraConfig, targets: Targets) -> None:
        self._targets = targets
        self._vectors = {"lora_magnitude_vector": "magnitude"} if config.use_dora else {}
        if config.lora_bias:
            self._vectors["lora_B.bias"] = "bias_delta"
        names = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
        own = (*names.items(), *((one, one) for one in (*_EMBEDDING, *self._vectors)))
        self.suffixes: Mapping[str, str] = {f".{end}": slot for end, slot in own}
        if config.use_dora:
            self.method = "DoRA"
        else:
            self.edges = frozenset({HEAD} if config.lora_bias else EDGES)
        # A DoRA changes what it touches even where B is zero.
        self.decider = "" if config.use_dora else "lora_B"

    @override
    def why_unexpected(self, name: str) -> str:
        if ".lora_magnitude_vector" in name:
            return "a magnitude belongs to DoRA, and the config has use_dora false"
        if name.endswith(".lora_B.bias"):
            return "a bias on lora_B needs lora_bias in the config"
        if name.startswith(PREFIX) and (".lora_A." in name or ".lora_B." in name):
            return "its name still holds the adapter's name; save the adapter with peft's save_pretrained"
        if name.startswith(PREFIX):
            return "it would replace a tensor of the base, and the config names no such module"
        return super().why_unexpected(name)

    @override
    def because(self, module: str) -> str:
        return f"rank {self._targets.rank(module)} from the config"

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        rank = self._targets.rank(module)
        outputs = width_out(sites)
        vectors = dict.fromkeys(self._vectors, (outputs,))
        a, b = _EMBEDDING if sites[0].name == EMBED else _EMBEDDING.values()
        return {a: (rank, sites[0].in_features), b: (outputs, rank), **vectors}

    @override
    def deciding(self, entries: Entries) -> TensorEntry:
        return entries["lora_embedding_B" if "lora_embedding_B" in entries else "lora_B"]

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        """A fused module y = W x of stacked parts has one A and one B whose rows are stacked likewise.

        So each part is a low-rank op with the same A and its own rows of B; rows are consecutive bytes.
        """
        a, b = (entries[end if end in entries else slot] for end, slot in _EMBEDDING.items())
        rank, scale = self._targets.rank(module), self._targets.scale(module)
        for site in sites:
            yield lowrank(site, layer, scale, a, b, rank=rank, a_row=0, b_row=site.out_offset)
            for end, slot in self._vectors.items():
                yield vector(site, layer, slot, entries[end], scale)
