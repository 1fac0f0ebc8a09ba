"""Weights and biases that take the place of the base's own, as the op `replace`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from adaptermesh.artifact.manifest_parts import TENSOR_DTYPES, ModuleOp, TensorEntry
from adaptermesh.artifact.ops import REPLACE
from adaptermesh.artifact.plan import Blocks, Piece, PlannedTensor, copied, tensor_name
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import EMBED, Site, SiteMap


@dataclass(frozen=True, slots=True)
class Replaced:
    """A module's own tensors, by its path; None for what stays the base's."""

    module: str
    weight: TensorEntry | None
    bias: TensorEntry | None


def replaced_pieces(replaced: Replaced, sites: SiteMap) -> Iterator[Piece]:
    """The ops of one module whose shapes were checked: one for each site in it, or one for a norm."""
    place = sites.parts(replaced.module)
    if place is not None:
        for site in place[0]:
            yield _of_site(replaced, site, place[1])
        return
    norm = sites.norm_at(replaced.module)
    if norm is None:
        raise ValueError(f"{replaced.module} is no module of this base")
    whole = {"weight": replaced.weight, "bias": replaced.bias}
    yield _piece(
        norm[0],
        norm[1],
        {
            slot: (entry, entry.shape, copied(entry.offset, entry.size))
            for slot, entry in whole.items()
            if entry
        },
    )


def _of_site(replaced: Replaced, site: Site, layer: int) -> Piece:
    parts: dict[str, tuple[TensorEntry, tuple[int, ...], Blocks]] = {}
    weight, bias = replaced.weight, replaced.bias
    if weight is not None:
        shape = (site.out_features, site.in_features)
        if site.name == EMBED:
            parts["weight"] = weight, weight.shape, copied(weight.offset, weight.size)
        elif site.transposed:
            parts["weight"] = weight, shape, _turned(weight, site)
        else:
            parts["weight"] = weight, shape, _rows(weight, site)
    if bias is not None:
        parts["bias"] = bias, (site.out_features,), _rows(bias, site)
    return _piece(site.name, layer, parts)


def _piece(site: str, layer: int, parts: dict[str, tuple[TensorEntry, tuple[int, ...], Blocks]]) -> Piece:
    names = {slot: tensor_name(site, layer, slot) for slot in parts}
    dtype = next(entry.dtype for entry, _, _ in parts.values())
    return (
        ModuleOp(site, layer, REPLACE, 0, 1.0, names, dtype),
        tuple(
            PlannedTensor(TensorSpec(names[slot], entry.dtype, shape), layer, blocks)
            for slot, (entry, shape, blocks) in parts.items()
        ),
    )


def _rows(entry: TensorEntry, site: Site) -> Blocks:
    """The site's rows of its module, which are consecutive bytes."""
    row = entry.size // entry.shape[0]
    return copied(entry.offset + site.out_offset * row, site.out_features * row)


def _turned(entry: TensorEntry, site: Site) -> Blocks:
    """The site's columns of a weight that is kept as (in, out), as rows."""

    def blocks(file: BinaryIO) -> Iterable[bytes]:
        values = np.memmap(file, f"<u{TENSOR_DTYPES[entry.dtype]}", "r", entry.offset, entry.shape)
        columns = slice(site.out_offset, site.out_offset + site.out_features)
        return (np.ascontiguousarray(values[:, columns].T).tobytes(),)

    return blocks
