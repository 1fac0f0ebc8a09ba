"""The bottlenecks of the `adapters` library: sequential, parallel and Compacter's, as the op `bottleneck`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from adaptermesh.artifact import adapters_phm
from adaptermesh.artifact.adapters_methods import BottleneckConfig
from adaptermesh.artifact.adapters_places import Places
from adaptermesh.artifact.adapters_tensors import Grouped, Reading, check_slots, compare, group
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import BOTTLENECK
from adaptermesh.artifact.plan import (
    Entries,
    Floats,
    Piece,
    Plan,
    PlannedTensor,
    Shape,
    Values,
    check_one_dtype,
    computed,
    copied,
    tensor_name,
    values_of,
)
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.source_files import CONFIG_FILE
from adaptermesh.artifact.uploaded import Uploaded

_PLAIN = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
_LEARNED_SHAPES = {"learned": 1, "channel": 0}


@dataclass(frozen=True, slots=True)
class _Block:
    """One bottleneck: its module, where it acts, and its inner width."""

    module: str
    site: str
    layer: int
    width: int


def plan_bottleneck(
    config: BottleneckConfig,
    reading: Reading,
) -> Plan:
    """What a bottleneck adapter becomes; of use only if no problem was noted."""
    places, sites, base, problems = reading.places, reading.sites, reading.base, reading.problems
    if places.post_norm:
        return Plan(unservable=f"not served yet: bottlenecks in a {base.architecture}, after its layer norms")
    blocks = {block.module: block for block in _blocks(config, places, sites, base, problems)}
    found = group(reading, config.container)
    compare(reading, found, blocks)
    if reading.failed:
        return Plan()
    _check(config, found, blocks, base, problems)
    if reading.failed:
        return Plan()
    if not blocks:
        problems.add("the adapter has no bottleneck in any layer: no module would be changed")
        return Plan()
    reader = _Reader(config, found.shared, reading.upload, base.hidden_size)
    pieces = [reader.piece(block, found.modules[module]) for module, block in blocks.items()]
    return Plan(
        modules=tuple(op for op, _ in pieces),
        tensors=tuple(tensor for _, parts in pieces for tensor in parts),
    ).bounded("bottleneck")


def _blocks(
    config: BottleneckConfig, places: Places, sites: SiteMap, base: BaseFacts, problems: Problems
) -> Iterator[_Block]:
    """Every bottleneck that the config asks for, in the order of the computation."""
    for layer in range(sites.num_layers):
        if layer in config.leave_out:
            continue
        width = config.width(base.hidden_size, layer)
        if width is None:
            problems.add(
                f"{CONFIG_FILE}: reduction_factor says nothing of layer {layer} and has no 'default'"
            )
            return
        if config.phm_layer and (width % config.phm_dim or base.hidden_size % config.phm_dim):
            problems.add(
                f"{CONFIG_FILE}: phm_dim is {config.phm_dim}, which does not divide both widths of "
                f"layer {layer}, {base.hidden_size} and {width}"
            )
            return
        for site in config.blocks():
            path = f"{sites.layer_path}.{places.blocks[site]}".replace("{layer}", str(layer))
            yield _Block(path, site, layer, width)


def _check(
    config: BottleneckConfig,
    found: Grouped,
    blocks: Mapping[str, _Block],
    base: BaseFacts,
    problems: Problems,
) -> None:
    hidden = base.hidden_size
    for module, block in blocks.items():
        entries = found.modules[module]
        why = f"{hidden} from the base and the inner width {block.width} from reduction_factor"
        shapes = _shapes(config, hidden, block.width)
        check_slots(f"module {shown(module)}", entries, shapes, why, problems)
        check_one_dtype(module, entries, problems)
    widths = {block.width for block in blocks.values()}
    shared: dict[str, Shape] = {}
    if config.phm_layer and widths:
        if config.shared_W_phm and len(widths) > 1:
            problems.add(f"{CONFIG_FILE}: shared_W_phm needs the same reduction_factor in every layer")
            return
        shared = adapters_phm.shared_shapes(config, hidden, min(widths))
    check_slots("what all modules share", found.shared, shared, "from the config and the base", problems)


def _shapes(config: BottleneckConfig, hidden: int, width: int) -> dict[str, Shape]:
    if config.phm_layer:
        shapes = adapters_phm.own_shapes(config, "down", hidden, width)
        shapes |= adapters_phm.own_shapes(config, "up", width, hidden)
    else:
        shapes = {_PLAIN[slot]: shape for slot, shape in _canonical_shapes(hidden, width).items()}
    if isinstance(config.scaling, str):
        shapes["scaling"] = (_LEARNED_SHAPES[config.scaling] or hidden,)
    return shapes


def _canonical_shapes(hidden: int, width: int) -> dict[str, Shape]:
    return {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}


class _Reader:
    """Makes ops of bottlenecks that were checked.

    A manifest's scale is one positive number: a learned one becomes it, and any other factor, a vector, a
    negative one or zero, is multiplied into `up` and its bias, in float32.
    """

    def __init__(self, config: BottleneckConfig, shared: Entries, upload: Uploaded, hidden: int) -> None:
        self._config = config
        self._shared = shared
        self._upload = upload
        self._hidden = hidden

    def piece(self, block: _Block, entries: Entries) -> Piece:
        """The op of one bottleneck and its tensors."""
        scale, factor = self._scale(entries)
        if self._config.phm_layer or factor is not None:
            tensors = tuple(self._computed(block, entries, factor))
        else:
            tensors = tuple(self._copied(block, entries))
        return (
            ModuleOp(
                block.site,
                block.layer,
                BOTTLENECK,
                0,
                scale,
                {slot: tensor.spec.name for slot, tensor in zip(_PLAIN, tensors, strict=True)},
                tensors[0].spec.dtype,
                options={"activation": self._config.activation, "input": self._config.reads},
            ),
            tensors,
        )

    def _scale(self, entries: Entries) -> tuple[float, Floats | None]:
        """The op's scale, and the factor [1] or [hidden] for `up` if the scale can't hold it."""
        scaling = self._config.scaling
        if not isinstance(scaling, str):
            return (scaling, None) if scaling > 0 else (1.0, np.array([scaling], np.float32))
        learned = self._upload.values(entries["scaling"])
        if scaling == "learned" and learned[0] > 0:
            return float(learned[0]), None
        return 1.0, learned

    def _copied(self, block: _Block, entries: Entries) -> Iterator[PlannedTensor]:
        for slot, source in _PLAIN.items():
            entry = entries[source]
            spec = TensorSpec(tensor_name(block.site, block.layer, slot), entry.dtype, entry.shape)
            yield PlannedTensor(spec, block.layer, copied(entry.offset, entry.size))

    def _computed(self, block: _Block, entries: Entries, factor: Floats | None) -> Iterator[PlannedTensor]:
        shapes = _canonical_shapes(self._hidden, block.width)
        for (slot, shape), values in zip(shapes.items(), self._values(block, entries), strict=True):
            scaled = _times(values, factor) if slot in ("up", "up_bias") and factor is not None else values
            spec = TensorSpec(tensor_name(block.site, block.layer, slot), "F32", shape)
            yield PlannedTensor(spec, block.layer, computed(scaled))

    def _values(self, block: _Block, entries: Entries) -> Iterator[Values]:
        if not self._config.phm_layer:
            yield from (values_of(entries[source]) for source in _PLAIN.values())
            return
        for position, outputs in (("down", block.width), ("up", self._hidden)):
            yield adapters_phm.matrix(self._config, position, entries, self._shared)
            yield adapters_phm.bias(position, entries, outputs)


def _times(values: Values, factor: Floats) -> Values:
    """Each row times its own factor, or all by the only one; values: [hidden, width] or [hidden]."""

    def scaled(file: BinaryIO) -> Floats:
        found = values(file)
        return found * factor.reshape(-1, *(1,) * (found.ndim - 1))

    return scaled
