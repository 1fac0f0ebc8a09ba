"""Methods of peft whose matrices have a structure that is kept: LoKr, OFT and BOFT."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from typing_extensions import override

from adaptermesh.artifact.manifest_parts import ModuleOp, TensorEntry
from adaptermesh.artifact.matrices import Doubles, cayley, cayley_series, product, shrunk, skew_of
from adaptermesh.artifact.ops import STRUCTURED
from adaptermesh.artifact.peft_models import BoftConfig, LokrConfig, OftConfig, TargetConfig
from adaptermesh.artifact.peft_plan import Reader
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.pieces import width_out
from adaptermesh.artifact.plan import (
    Entries,
    Floats,
    Piece,
    PlannedTensor,
    Shape,
    Values,
    computed,
    tensor_name,
    values_of,
)
from adaptermesh.artifact.problems import Problems, Rejection, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import Site, SiteMap

MAX_BLOCK = 256
"""Inputs that one block of a rotation may mix: a token's product grows with it, and so does the ingest."""

StructuredConfig = LokrConfig | OftConfig | BoftConfig

_FIRST_WITH_SERIES = (0, 18)
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")
_Matrices = Callable[[BinaryIO], Doubles]


class LokrReader(Reader):
    """`s kron(w1, w2)`, s = alpha / r; either matrix may be given as a product of rank r."""

    method = "LoKr"
    suffixes: Mapping[str, str] = {
        f".{name}": name
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    }
    decider = "lokr_w1"

    def __init__(self, config: LokrConfig, targets: Targets) -> None:
        self._config = config
        self._targets = targets

    @override
    def deciding(self, entries: Entries) -> TensorEntry:
        # peft begins with zeros in it, whole or not.
        return entries["lokr_w1" if "lokr_w1" in entries else "lokr_w1_a"]

    @override
    def because(self, module: str) -> str:
        config = self._config
        both = ", decompose_both" if config.decompose_both else ""
        return (
            f"rank {self._targets.rank(module)}, decompose_factor {config.decompose_factor}{both} "
            "from the config"
        )

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        rank = self._targets.rank(module)
        (o1, o2), (i1, i2) = self._split(sites)
        whole1 = not self._config.decompose_both or 2 * rank >= max(o1, i1)
        whole2 = 2 * rank >= max(o2, i2)
        return {
            **_factors("lokr_w1", o1, i1, None if whole1 else rank),
            **_factors("lokr_w2", o2, i2, None if whole2 else rank),
        }

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        """Of a fused module, a site has all of w2 and those rows of w1 that reach into its own outputs.

        So the site's first output may lie up to a row of w1 behind the product's: at `out_offset` modulo the
        rows of w2.
        """
        (_, o2), (i1, i2) = self._split(sites)
        scale = self._targets.scale(module)
        w1, w2 = _multiplied("lokr_w1", entries), _multiplied("lokr_w2", entries)
        for site in sites:
            rows = slice(site.out_offset // o2, -(-(site.out_offset + site.out_features) // o2))
            tensors = {
                "w1": ((rows.stop - rows.start, i1), _rows(w1, rows)),
                "w2": ((o2, i2), w2),
            }
            yield _piece(site, layer, scale, module, tensors)

    def _split(self, sites: Sequence[Site]) -> tuple[tuple[int, int], tuple[int, int]]:
        factor = self._config.decompose_factor
        return factored(width_out(sites), factor), factored(sites[0].in_features, factor)


class OftReader(Reader):
    """`W (x R) + b`: R is block-diagonal, each block a rotation made of the numbers above its diagonal."""

    method = "OFT"
    suffixes: Mapping[str, str] = {".oft_R.weight": "oft_R"}
    decider = "oft_R"

    def __init__(self, config: OftConfig, problems: Problems) -> None:
        self._config = config
        if (config.r == 0) == (config.oft_block_size == 0):
            problems.add(
                "adapter_config.json: one of r and oft_block_size has to be 0, "
                f"found {config.r} and {config.oft_block_size}"
            )

    @override
    def because(self, module: str) -> str:
        config = self._config
        share = ", block_share" if config.block_share else ""
        return f"r {config.r}, oft_block_size {config.oft_block_size}{share} from the config"

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        count, size = self._blocks(sites)
        return {"oft_R": (count, size * (size - 1) // 2)}

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        count, size = self._blocks(sites)
        packed, config = values_of(entries["oft_R"]), self._config

        def rotations(file: BinaryIO) -> Doubles:
            skew = skew_of(packed(file).astype(np.float64), size)
            if config.coft:
                skew = shrunk(skew, config.eps / math.sqrt(count))
            if config.use_cayley_neumann:
                return cayley_series(skew, config.num_cayley_neumann_terms)[None]
            return cayley(skew)[None]

        for site in sites:
            yield _piece(site, layer, 1.0, module, {"R": ((1, count, size, size), rotations)})

    def largest_block(self, sites: Sequence[Site]) -> int:
        """The inputs that one block mixes in a module."""
        return self._blocks(sites)[1]

    def _blocks(self, sites: Sequence[Site]) -> tuple[int, int]:
        """How many there are in the file, and how wide each is."""
        config, width = self._config, sites[0].in_features
        if config.r:
            count = nearest_divisor(width, config.r)
            size = width // count
        else:
            size = nearest_divisor(width, config.oft_block_size)
            count = width // size
        return 1 if config.block_share else count, size


class BoftReader(Reader):
    """`s W (x R) + b`: R is a product of rotations in blocks, s a factor for each row."""

    method = "BOFT"
    suffixes: Mapping[str, str] = {".boft_R": "boft_R", ".boft_s": "boft_s"}
    decider = ""

    def __init__(self, config: BoftConfig, targets: Targets, sites: SiteMap, problems: Problems) -> None:
        self._config = config
        if (config.boft_block_size == 0) == (config.boft_block_num == 0):
            problems.add(
                "adapter_config.json: one of boft_block_size and boft_block_num has to be 0, "
                f"found {config.boft_block_size} and {config.boft_block_num}"
            )
            return
        given = config.boft_block_size or config.boft_block_num
        for module in targets.modules:
            place = sites.parts(module)
            if place is not None and place[0][0].in_features % given:
                problems.add(
                    f"module {shown(module)} has {place[0][0].in_features} inputs, "
                    f"which is no multiple of {given}: {self.because(module)}"
                )

    @override
    def because(self, module: str) -> str:
        config = self._config
        return (
            f"boft_block_size {config.boft_block_size}, boft_block_num {config.boft_block_num}, "
            f"boft_n_butterfly_factor {config.boft_n_butterfly_factor} from the config"
        )

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        size = self.largest_block(sites)
        count = sites[0].in_features // size
        shape = entries["boft_R"].shape if "boft_R" in entries else ()
        factors = self._config.boft_n_butterfly_factor
        # Without its CUDA extension peft makes one factor, whatever the config asks for.
        if shape[:1] == (1,) or not _has_butterfly(count, size, factors):
            factors = 1
        return {"boft_R": (factors, count, size, size), "boft_s": (width_out(sites), 1)}

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        shape = entries["boft_R"].shape
        given, factors = values_of(entries["boft_R"]), values_of(entries["boft_s"])

        def rotations(file: BinaryIO) -> Doubles:
            values = given(file).astype(np.float64).reshape(-1, *shape[2:])
            return cayley(0.5 * (values - values.transpose(0, 2, 1))).reshape(shape)

        def scales(file: BinaryIO) -> Doubles:
            return factors(file)[:, 0].astype(np.float64)

        for site in sites:
            rows = slice(site.out_offset, site.out_offset + site.out_features)
            tensors = {"R": (shape, rotations), "row_scale": ((site.out_features,), _rows(scales, rows))}
            yield _piece(site, layer, 1.0, module, tensors)

    def largest_block(self, sites: Sequence[Site]) -> int:
        """The inputs that one block mixes in a module."""
        config, width = self._config, sites[0].in_features
        return config.boft_block_size or width // config.boft_block_num


def structured_reader(
    config: StructuredConfig, targets: Targets, sites: SiteMap, problems: Problems
) -> LokrReader | OftReader | BoftReader:
    """The reader of one of the three."""
    if isinstance(config, LokrConfig):
        return LokrReader(config, targets)
    if isinstance(config, OftConfig):
        return OftReader(config, problems)
    return BoftReader(config, targets, sites, problems)


def why_not_served(config: TargetConfig, reader: Reader, targets: Targets, sites: SiteMap) -> str:
    """Why an adapter of this config is stored and not served; empty if it is served, or another method."""
    if not isinstance(config, StructuredConfig):
        return ""
    if any(site.transposed for site in sites.sites):
        return f"not served: peft has no {reader.method} for the Conv1D modules of this base"
    if isinstance(config, OftConfig) and config.use_cayley_neumann and not _has_series(config.peft_version):
        return (
            f"not served: peft {config.peft_version or 'of unknown version'} computed use_cayley_neumann in "
            "another way than 0.18 and later do; train it again"
        )
    if isinstance(reader, OftReader | BoftReader):
        found = [place[0] for module in targets.modules if (place := sites.parts(module))]
        largest = max((reader.largest_block(parts) for parts in found), default=0)
        if largest > MAX_BLOCK:
            return f"not served: a block of it mixes {largest} inputs; the most that is served is {MAX_BLOCK}"
    return ""


def factored(width: int, factor: int) -> tuple[int, int]:
    """How peft's LoKr splits a width into two: by the factor if that divides it.

    Else by the largest divisor up to the factor (-1: of any size) that is the smaller of the two.
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor == -1 else min(factor, math.isqrt(width))
    first = next((divisor for divisor in range(most, 1, -1) if width % divisor == 0), 1)
    return first, width // first


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of a width that peft's OFT takes for one that may not divide it; the lower of two."""
    if wanted >= width:
        return width
    lower = next(number for number in range(wanted, 0, -1) if width % number == 0)
    higher = next(number for number in range(wanted, width + 1) if width % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _has_butterfly(count: int, size: int, factors: int) -> bool:
    """Whether blocks can be mixed in so many factors: halves of them are what is exchanged."""
    return factors == 1 or (count % 2 ** (factors - 1) == 0 and size % 2 == 0)


def _has_series(version: str | None) -> bool:
    found = _VERSION.match(version or "")
    return found is not None and (int(found[1]), int(found[2])) >= _FIRST_WITH_SERIES


def _factors(name: str, outputs: int, inputs: int, rank: int | None) -> dict[str, Shape]:
    """The tensors of a matrix; `rank` None: it is whole."""
    if rank is None:
        return {name: (outputs, inputs)}
    return {f"{name}_a": (outputs, rank), f"{name}_b": (rank, inputs)}


def _multiplied(name: str, entries: Entries) -> _Matrices:
    if name in entries:
        whole = values_of(entries[name])
        return lambda file: whole(file).astype(np.float64)
    a, b = values_of(entries[f"{name}_a"]), values_of(entries[f"{name}_b"])
    return lambda file: product(a(file).astype(np.float64), b(file).astype(np.float64))


def _rows(values: _Matrices, rows: slice) -> _Matrices:
    return lambda file: values(file)[rows]


def _piece(
    site: Site, layer: int, scale: float, module: str, tensors: Mapping[str, tuple[Shape, _Matrices]]
) -> Piece:
    names = {slot: tensor_name(site.name, layer, slot) for slot in tensors}
    return (
        ModuleOp(site.name, layer, STRUCTURED, 0, scale, names),
        tuple(
            PlannedTensor(TensorSpec(names[slot], "F32", shape), layer, computed(_rounded(values, module)))
            for slot, (shape, values) in tensors.items()
        ),
    )


def _rounded(values: _Matrices, module: str) -> Values:
    """Finite numbers may have a product that is not."""

    def rounded(file: BinaryIO) -> Floats:
        with np.errstate(all="ignore"):
            found = values(file).astype(np.float32)
        if not np.isfinite(found).all():
            raise Rejection([f"module {shown(module)} has values so large that their product is not finite"])
        return found

    return rounded
