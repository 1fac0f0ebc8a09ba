"""What must hold for the bottlenecks of a manifest, the groups of them, and what fuses them."""

from collections.abc import Mapping, Sequence

from adaptermesh.artifact.manifest_parts import ModuleOp, Named, TensorEntry, need
from adaptermesh.artifact.ops import BOTTLENECK, BOTTLENECK_GROUP, NEXT
from adaptermesh.artifact.sites import BLOCKS

_FUSING = frozenset({"query", "query_bias", "key", "key_bias", "value"})


def check_bottleneck(module: ModuleOp, entries: Mapping[str, TensorEntry], hidden: int, what: Named) -> None:
    """One bottleneck, of a group or not; raises MeshError DATA_LOSS (DATA_CORRUPT)."""
    width = entries[module.tensors["down"]].shape[0]
    shapes = {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}
    _check_place(module, what)
    _check_shapes(module, entries, shapes, what)
    given = _FUSING & module.tensors.keys()
    if given:
        need({"query", "key"} <= given, "{} has slots {}", what, sorted(given))
        _check_shapes(module, entries, _fusing_shapes(hidden), what)


def check_fusion(module: ModuleOp, entries: Mapping[str, TensorEntry], hidden: int, what: Named) -> None:
    """One place of a fusion; raises MeshError DATA_LOSS (DATA_CORRUPT)."""
    _check_place(module, what)
    need(module.scale == 1.0, "{} has scale {} for nothing", what, module.scale)
    _check_shapes(module, entries, _fusing_shapes(hidden), what)


def check_groups(modules: Sequence[ModuleOp]) -> None:
    """That the members of each group are all there and in order, and its steps can be computed.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT).
    """
    alone = {(module.layer, module.site) for module in modules if module.op == BOTTLENECK}
    groups: dict[tuple[int, str], list[ModuleOp]] = {}
    for module in modules:
        if module.op == BOTTLENECK_GROUP:
            place = (module.layer, module.site)
            need(place not in alone, "{} is beside a bottleneck of no group", Named(module))
            groups.setdefault(place, []).append(module)
    for group in groups.values():
        _check_group(group)


def _check_group(group: Sequence[ModuleOp]) -> None:
    begun: ModuleOp | None = None
    for number, module in enumerate(group):
        what, options = Named(module), module.options or {}
        need(module.member == number, "{} comes as number {} of its group", what, number)
        need(module.expert is None, "{} has an expert", what)
        fuses = "query" in module.tensors
        if options["step"] == NEXT:
            begun = module if fuses else None
        else:
            need(begun is not None and not fuses, "{} joins a step that fuses nothing", what)
        if begun is not None:
            source = (begun.options or {})["input"]
            need(options["input"] == source, "{} reads something else than what it is fused with", what)
            need(source != "residual", "{} is fused and reads the residual", what)
    first = group[0]
    need(len(group) > 1 or "query" in first.tensors, "{} is a group of one", Named(first))


def _check_place(module: ModuleOp, what: Named) -> None:
    need(module.site in BLOCKS, "{} is at no block", what)
    need(module.rank == 0, "{} has rank {}", what, module.rank)


def _fusing_shapes(hidden: int) -> Mapping[str, tuple[int, ...]]:
    return {slot: (hidden,) if slot.endswith("bias") else (hidden, hidden) for slot in _FUSING}


def _check_shapes(
    module: ModuleOp,
    entries: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, ...]],
    what: Named,
) -> None:
    """Of the slots in `shapes` that the module has."""
    for slot, shape in shapes.items():
        if slot in module.tensors:
            found = entries[module.tensors[slot]].shape
            need(found == shape, "{} has {} of shape {}", what, slot, found)
