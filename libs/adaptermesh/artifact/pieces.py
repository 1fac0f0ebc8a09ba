"""The pieces that methods of both libraries become: low-rank ops and vectors over a module's outputs."""

import math
from collections.abc import Iterator, Sequence

from adaptermesh.artifact.manifest_parts import ModuleOp, TensorEntry
from adaptermesh.artifact.ops import AFFINE, LOWRANK, TOKEN_ROWS
from adaptermesh.artifact.plan import Piece, PlannedTensor, Values, computed, copied, tensor_name
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import Site


def width_out(sites: Sequence[Site]) -> int:
    """Outputs of a module."""
    return sum(site.out_features for site in sites)


def lowrank(
    site: Site, layer: int, scale: float, a: TensorEntry, b: TensorEntry, *, rank: int, a_row: int, b_row: int
) -> Piece:
    """A low-rank op whose A is `rank` rows of `a` [.., in] and whose B is the site's rows of `b` [.., rank].

    Rows are consecutive bytes: both are copied as they are, from the rows given on.
    """
    names = {slot: tensor_name(site.name, layer, slot) for slot in ("A", "B")}
    spec_a = TensorSpec(names["A"], a.dtype, (rank, site.in_features))
    spec_b = TensorSpec(names["B"], b.dtype, (site.out_features, rank))
    return (
        ModuleOp(site.name, layer, LOWRANK, rank, scale, names, a.dtype),
        (
            PlannedTensor(spec_a, layer, copied(a.offset + a_row * _row_bytes(a), spec_a.size)),
            PlannedTensor(spec_b, layer, copied(b.offset + b_row * _row_bytes(b), spec_b.size)),
        ),
    )


def computed_lowrank(
    sites: Sequence[Site], layer: int, rank: int, scale: float, a: Values, b: Values
) -> Iterator[Piece]:
    """A for every part of a module, and each part's own rows of B."""
    for site in sites:
        names = {slot: tensor_name(site.name, layer, slot) for slot in ("A", "B")}
        rows = slice(site.out_offset, site.out_offset + site.out_features)
        yield (
            ModuleOp(site.name, layer, LOWRANK, rank, scale, names),
            (
                PlannedTensor(TensorSpec(names["A"], "F32", (rank, site.in_features)), layer, computed(a)),
                PlannedTensor(
                    TensorSpec(names["B"], "F32", (site.out_features, rank)), layer, computed(_rows(b, rows))
                ),
            ),
        )


def vector(
    site: Site, layer: int, slot: str, entry: TensorEntry, scale: float = 1.0, *, row: int | None = None
) -> Piece:
    """An affine op of one vector over a module's outputs, of which the site takes its own.

    They begin at `row` of the uploaded tensor, or where the site begins in its module.
    """
    start = site.out_offset if row is None else row
    spec = TensorSpec(tensor_name(site.name, layer, slot), entry.dtype, (site.out_features,))
    return (
        ModuleOp(site.name, layer, AFFINE, 0, scale, {slot: spec.name}, entry.dtype),
        (PlannedTensor(spec, layer, copied(entry.offset + start * _row_bytes(entry), spec.size)),),
    )


def token_rows(site: str, layer: int, tokens: tuple[int, ...], entry: TensorEntry) -> Piece:
    """Rows of the vocabulary, [tokens, hidden], in place of the base's."""
    spec = TensorSpec(tensor_name(site, layer, "rows"), entry.dtype, entry.shape)
    return (
        ModuleOp(site, layer, TOKEN_ROWS, 0, 1.0, {"rows": spec.name}, entry.dtype, tokens=tokens),
        (PlannedTensor(spec, layer, copied(entry.offset, entry.size)),),
    )


def _row_bytes(entry: TensorEntry) -> int:
    return entry.size // entry.shape[0] if math.prod(entry.shape) else 0


def _rows(values: Values, rows: slice) -> Values:
    return lambda file: values(file)[rows]
