"""What must hold for the bottlenecks of a manifest, the groups of them, and what fuses them."""

from collections.abc import Iterator, Mapping, Sequence

from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import BOTTLENECK, BOTTLENECK_GROUP, FUSION, NEXT
from adaptermesh.artifact.sites import BLOCKS

Shapes = Mapping[str, tuple[int, ...]]
"""Of a module's tensors, by slot."""

_FUSING = frozenset({"query", "query_bias", "key", "key_bias", "value"})


def wrong_bottleneck(module: ModuleOp, shapes: Shapes, hidden: int) -> str:
    """What is wrong with a bottleneck, of a group or not, or with a fusion's part; empty if nothing is."""
    if module.site not in BLOCKS:
        return "is at no block"
    if module.rank:
        return f"has rank {module.rank}"
    if module.op == FUSION and module.scale != 1.0:
        return f"has scale {module.scale} for nothing"
    given = _FUSING & shapes.keys()
    if given and not {"query", "key"} <= given:
        return f"has slots {sorted(given)}"
    expected = {slot: (hidden,) if slot.endswith("bias") else (hidden, hidden) for slot in given}
    if module.op != FUSION:
        width = shapes["down"][0]
        expected |= {"down": (width, hidden), "down_bias": (width,)}
        expected |= {"up": (hidden, width), "up_bias": (hidden,)}
    return next(
        (f"has {slot} of shape {shapes[slot]}" for slot in expected if shapes[slot] != expected[slot]), ""
    )


def wrong_groups(modules: Sequence[ModuleOp]) -> Iterator[tuple[ModuleOp, str]]:
    """The modules that make a group one that can't be computed, each with what is wrong with it.

    A group has all its members, in their order, and has to be one: what acts alone is a plain bottleneck.
    """
    alone = {(module.layer, module.site) for module in modules if module.op == BOTTLENECK}
    groups: dict[tuple[int, str], list[ModuleOp]] = {}
    for module in modules:
        if module.op == BOTTLENECK_GROUP:
            groups.setdefault((module.layer, module.site), []).append(module)
        elif module.member:
            yield module, "is of no group"
    for place, group in groups.items():
        if place in alone:
            yield group[0], "is beside a bottleneck of no group"
        if len(group) == 1 and "query" not in group[0].tensors:
            yield group[0], "is a group of one"
        yield from _wrong_steps(group)


def _wrong_steps(group: Sequence[ModuleOp]) -> Iterator[tuple[ModuleOp, str]]:
    begun: ModuleOp | None = None
    for number, module in enumerate(group):
        options, fuses = module.options or {}, "query" in module.tensors
        if module.member != number:
            yield module, f"comes as number {number} of its group"
        if module.expert is not None:
            yield module, "has an expert"
        if options["step"] == NEXT:
            begun = module if fuses else None
        elif begun is None or fuses:
            yield module, "joins a step that fuses nothing"
        if begun is not None:
            if options["input"] != (begun.options or {})["input"]:
                yield module, "reads something else than what it is fused with"
            if options["input"] == "residual":
                yield module, "is fused and reads the residual"
