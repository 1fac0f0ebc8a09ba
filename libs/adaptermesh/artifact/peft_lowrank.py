"""Methods of peft that are exactly a LoRA: AdaLoRA, LoHa and VeRA become A and B here, in float32."""

from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

from typing_extensions import override

from adaptermesh.artifact.manifest_parts import TENSOR_DTYPES, TensorEntry
from adaptermesh.artifact.peft_models import AdaLoraConfig, VeraConfig
from adaptermesh.artifact.peft_plan import PREFIX, Reader
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.pieces import computed_lowrank, width_out
from adaptermesh.artifact.plan import Entries, Floats, Piece, Shape, values_of
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import HEAD, Site

MAX_LOHA_RANK = 64
"""Its square is the rank of the LoRA that a LoHa is."""
VERA_SHARED = ("base_model.vera_A", "base_model.vera_B")

_ADALORA_EPSILON = 1e-5


class AdaLoraReader(Reader):
    """`s B (E * A)`: E [r, 1] scales the rows of A; s = alpha / (init_r + 1e-5), also after pruning."""

    method = "AdaLoRA"
    edges = frozenset({HEAD})
    suffixes: Mapping[str, str] = {".lora_A": "lora_A", ".lora_B": "lora_B", ".lora_E": "lora_E"}
    decider = "lora_E"

    def __init__(self, config: AdaLoraConfig) -> None:
        self._scale = config.lora_alpha / (config.init_r + _ADALORA_EPSILON)
        self._most = config.init_r
        self._left = {
            name.removeprefix(PREFIX).partition(".lora_E")[0]: sum(rows)
            for name, rows in config.rank_pattern.items()
        }

    @override
    def may_lack(self, module: str) -> bool:
        # Pruned to nothing.
        return self._left.get(module) == 0

    @override
    def because(self, module: str) -> str:
        left = self._left.get(module)
        if left is None:
            return f"rank at most {self._most} from the config"
        return f"{left} rows left in the config"

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        rank = self._left.get(module)
        if rank is None:
            # Without a pattern, nothing was pruned, or peft has left the pattern out: the tensors say it.
            shape = entries["lora_A"].shape if "lora_A" in entries else ()
            rank = min(shape[0], self._most) if shape else self._most
        return {
            "lora_A": (rank, sites[0].in_features),
            "lora_B": (width_out(sites), rank),
            "lora_E": (rank, 1),
        }

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        a, b, e = (values_of(entries[slot]) for slot in ("lora_A", "lora_B", "lora_E"))
        rank = entries["lora_A"].shape[0]
        return computed_lowrank(sites, layer, rank, self._scale, lambda file: e(file) * a(file), b)


class LohaReader(Reader):
    """`s (w1_a w1_b) * (w2_a w2_b)`, entry by entry.

    That is a LoRA of rank r^2: its B has the products of all pairs of columns, its A those of rows.
    """

    method = "LoHa"
    edges = frozenset({HEAD})
    suffixes: Mapping[str, str] = {
        ".hada_w1_a": "hada_w1_a",
        ".hada_w1_b": "hada_w1_b",
        ".hada_w2_a": "hada_w2_a",
        ".hada_w2_b": "hada_w2_b",
    }
    decider = "hada_w2_a"

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    @override
    def because(self, module: str) -> str:
        return f"rank {self._targets.rank(module)} from the config"

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        rank, outputs, inputs = self._targets.rank(module), width_out(sites), sites[0].in_features
        return {
            "hada_w1_a": (outputs, rank),
            "hada_w1_b": (rank, inputs),
            "hada_w2_a": (outputs, rank),
            "hada_w2_b": (rank, inputs),
        }

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        w1_a, w1_b, w2_a, w2_b = (values_of(entries[slot]) for slot in self.suffixes.values())
        rank = self._targets.rank(module)

        def a(file: BinaryIO) -> Floats:
            return (w1_b(file)[:, None] * w2_b(file)[None]).reshape(rank * rank, -1)

        def b(file: BinaryIO) -> Floats:
            return (w1_a(file)[:, :, None] * w2_a(file)[:, None]).reshape(-1, rank * rank)

        return computed_lowrank(sites, layer, rank * rank, self._targets.scale(module), a, b)


class VeraReader(Reader):
    """`lambda_b * (B (lambda_d * (A x)))`.

    A and B are shared: each module takes their first columns and rows.
    """

    method = "VeRA"
    edges = frozenset({HEAD})
    suffixes: Mapping[str, str] = {".vera_lambda_b": "vera_lambda_b", ".vera_lambda_d": "vera_lambda_d"}
    decider = "vera_lambda_b"

    def __init__(self, config: VeraConfig, shared_a: TensorEntry, shared_b: TensorEntry) -> None:
        self._rank = config.r
        self._a = values_of(shared_a)
        self._b = values_of(shared_b)

    @override
    def because(self, module: str) -> str:
        return f"rank {self._rank} from the config"

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        return {"vera_lambda_b": (width_out(sites),), "vera_lambda_d": (self._rank,)}

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        lambda_b, lambda_d = (values_of(entries[slot]) for slot in ("vera_lambda_b", "vera_lambda_d"))
        inputs, outputs = sites[0].in_features, width_out(sites)

        def a(file: BinaryIO) -> Floats:
            return lambda_d(file)[:, None] * self._a(file)[:, :inputs]

        def b(file: BinaryIO) -> Floats:
            return lambda_b(file)[:, None] * self._b(file)[:outputs]

        return computed_lowrank(sites, layer, self._rank, 1.0, a, b)


def check_vera_shared(
    config: VeraConfig, tensors: Mapping[str, TensorEntry], targets: Targets, problems: Problems
) -> None:
    """Notes what is wrong with the matrices that all modules of a VeRA share."""
    inputs, outputs = targets.widest
    for name, rank_axis, width in zip(VERA_SHARED, (0, 1), (inputs, outputs), strict=True):
        entry = tensors.get(name)
        if entry is None:
            problems.add(f"tensor {shown(name)} is absent: save the adapter with save_projection")
            continue
        what, shape = f"tensor {shown(name)}", entry.shape
        if entry.dtype not in TENSOR_DTYPES:
            problems.add(f"{what} is {entry.dtype}, expected one of {', '.join(TENSOR_DTYPES)}")
        if len(shape) != 2 or shape[rank_axis] != config.r or shape[1 - rank_axis] < width:
            problems.add(
                f"{what} has shape {list(shape)}, expected rank {config.r} from the config and "
                f"at least {width} from the widest module"
            )
