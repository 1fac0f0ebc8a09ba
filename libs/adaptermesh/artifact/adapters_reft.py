"""The `adapters` library's LoReFT, NoReFT and DiReFT: interventions on the stream, as the op `reft`.

A unit acts on the first tokens of a prompt, another one on the last, or one on both if they are tied. What a
LoReFT's projection is follows from three tensors: torch's orthogonal parametrisation keeps the vectors of
Householder reflections, signs on their diagonal, and the matrix that it began with.
"""

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adaptermesh.artifact.adapters_methods import ReftConfig
from adaptermesh.artifact.adapters_tensors import Reading, check_slots, compare, group
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import MAX_POSITIONS, REFT
from adaptermesh.artifact.ordered_product import matmul
from adaptermesh.artifact.plan import (
    Blocks,
    Entries,
    Floats,
    Piece,
    Plan,
    PlannedTensor,
    Shape,
    Values,
    check_one_dtype,
    computed,
    tensor_name,
    values_of,
)
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.source_files import CONFIG_FILE

_SITE = "ffn"
_PLAIN = "projection.weight"
_VECTORS = "projection.parametrizations.weight.original"
_BEGAN = "projection.parametrizations.weight.0.base"


def plan_reft(
    config: ReftConfig,
    reading: Reading,
) -> Plan:
    """What a ReFT becomes; of use only if no problem was noted."""
    sites, base, problems = reading.sites, reading.base, reading.problems
    if reading.places.post_norm:
        return Plan(unservable=f"not served yet: ReFT in a {base.architecture}")
    if max(config.prefix_positions, config.suffix_positions) > MAX_POSITIONS:
        return Plan(
            unservable=f"not served: it acts on more than {MAX_POSITIONS} tokens at an end of a prompt"
        )
    if config.orthogonality and config.r >= base.hidden_size:
        return Plan(unservable=f"not served: an orthogonal ReFT of rank {config.r}, as wide as the base")
    layers = _layers(config, sites, base, problems)
    modules = {f"{sites.layer_path}.reft_layer".replace("{layer}", str(layer)): layer for layer in layers}
    found = group(reading, config.container)
    compare(reading, found, modules)
    if reading.failed:
        return Plan()
    shapes = _shapes(config, base.hidden_size)
    for module in modules:
        why = f"rank {config.r} from the config and {base.hidden_size} from the base"
        check_slots(f"module {shown(module)}", found.modules[module], shapes, why, problems)
        check_one_dtype(module, found.modules[module], problems)
    check_slots("what all modules share", found.shared, {}, "a ReFT shares nothing", problems)
    if not modules:
        problems.add("the adapter acts in no layer: no module would be changed")
    if reading.failed:
        return Plan()
    pieces = [
        _piece(config, layer, found.modules[module], base.hidden_size) for module, layer in modules.items()
    ]
    return Plan(
        modules=tuple(op for op, _ in pieces),
        tensors=tuple(tensor for _, parts in pieces for tensor in parts),
    ).bounded("ReFT")


def _layers(config: ReftConfig, sites: SiteMap, base: BaseFacts, problems: Problems) -> list[int]:
    if isinstance(config.layers, str):
        return list(range(sites.num_layers))
    for layer in config.layers:
        if layer >= sites.num_layers:
            problems.add(f"{CONFIG_FILE}: layers names {layer}, but {base.title} has only {sites.num_layers}")
    return sorted({layer for layer in config.layers if layer < sites.num_layers})


def _shapes(config: ReftConfig, hidden: int) -> dict[str, Shape]:
    """What a module has to have; the unit of an end without tokens is in the file too."""
    own: dict[str, Shape] = {
        "learned_source.weight": (config.r, hidden),
        "learned_source.bias": (config.r,),
    }
    if config.orthogonality:
        own |= {_VECTORS: (config.r, hidden), _BEGAN: (hidden, hidden)}
    else:
        own |= {_PLAIN: (config.r, hidden)}
    units = 1 if config.tied_weights else 2
    return {f"units.{unit}.{slot}": shape for unit in range(units) for slot, shape in own.items()}


def _piece(config: ReftConfig, layer: int, entries: Entries, hidden: int) -> Piece:
    """The op of one layer and its tensors."""
    ends: list[tuple[int, str]] = []
    if config.tied_weights or config.prefix_positions:
        ends.append((0, ""))
    if not config.tied_weights and config.suffix_positions:
        ends.append((1, "_suffix"))
    names: dict[str, str] = {}
    tensors: list[PlannedTensor] = []
    for unit, end in ends:
        values: Mapping[str, tuple[Shape, Blocks]] = {
            "R": ((config.r, hidden), computed(_projection(config, entries, unit))),
            "W": ((config.r, hidden), computed(values_of(entries[f"units.{unit}.learned_source.weight"]))),
            "b": ((config.r,), computed(values_of(entries[f"units.{unit}.learned_source.bias"]))),
        }
        for slot, (shape, blocks) in values.items():
            names[f"{slot}{end}"] = tensor_name(_SITE, layer, f"{slot}{end}")
            tensors.append(PlannedTensor(TensorSpec(names[f"{slot}{end}"], "F32", shape), layer, blocks))
    options = {
        "activation": config.activation,
        "subtract": "yes" if config.subtracts else "no",
        "prefix": str(config.prefix_positions),
        "suffix": str(config.suffix_positions),
    }
    return ModuleOp(_SITE, layer, REFT, config.r, 1.0, names, "F32", options=options), tuple(tensors)


def _projection(config: ReftConfig, entries: Entries, unit: int) -> Values:
    if not config.orthogonality:
        return values_of(entries[f"units.{unit}.{_PLAIN}"])
    vectors, began = (values_of(entries[f"units.{unit}.{slot}"]) for slot in (_VECTORS, _BEGAN))

    def values(file: BinaryIO) -> Floats:
        return np.ascontiguousarray(matmul(began(file), _reflected(vectors(file))).T)

    return values


def _reflected(vectors: Floats) -> Floats:
    """The first columns of the product of Householder reflections: [hidden, r]. vectors: [r, hidden].

    Source: torch 2.13, `torch.nn.utils.parametrizations.orthogonal` with the map "householder".
    """
    rank, hidden = vectors.shape
    below: npt.NDArray[np.float64] = np.tril(vectors.T.astype(np.float64), -1)
    product: npt.NDArray[np.float64] = np.eye(hidden, rank)
    for column in range(rank - 1, -1, -1):
        v = below[:, column].copy()
        # The length is that of what is stored; the one on the diagonal is understood.
        tau = 2.0 / (1.0 + float(np.add.accumulate(v * v)[-1]))
        v[column] = 1.0
        product -= tau * v[:, None] * np.add.accumulate(v[:, None] * product, axis=0)[-1]
    # The library reads the signs as integers, by cutting off.
    signs = np.trunc(np.diagonal(vectors.T)).astype(np.float64)
    return (product * signs).astype(np.float32)
