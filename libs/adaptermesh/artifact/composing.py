"""A composition of adapters as one adapter: what a worker serves in its place.

Composed where it is served, from members that were verified; it is never published. Its identity is the
composition's over the members' digests, not the digest of the manifest made here.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptermesh.artifact.bottleneck_steps import untaken, written
from adaptermesh.artifact.canonical import Buffer, tensor_view, to_float32
from adaptermesh.artifact.chunking import cut
from adaptermesh.artifact.effects import (
    Effect,
    averaged,
    effect_of,
    scaled,
    stacked,
)
from adaptermesh.artifact.fusing import bottleneck_of, check_fuse, fused
from adaptermesh.artifact.manifest import Chunk, Cost, Manifest, ModuleOp, Source
from adaptermesh.artifact.ops import AFFINE, FUSION, KV_PREFIX, LOWRANK, PROMPT
from adaptermesh.artifact.plan import Floats
from adaptermesh.artifact.safetensors_file import TensorSpec, lay_out
from adaptermesh.core.composition import (
    AVERAGE,
    FUSE,
    Composition,
    Group,
    Leaf,
    composition_digest,
    fusions,
    leaves,
    parse_resolved,
)
from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch

COMPOSED_FORMAT = "adaptermesh.composition.v1"
MAX_COMPOSED_BYTES = 2 * 2**30
_EXPRESSION = "expression"

_Place = tuple[int, str]
"""Layer and site."""


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter that was verified: its manifest and its canonical tensor file."""

    manifest: Manifest
    buffer: Buffer


@dataclass(frozen=True, slots=True)
class Opened:
    """An adapter's modules, and what gives their tensors by name."""

    modules: Sequence[ModuleOp]
    read: Callable[[str], Floats]


@dataclass(frozen=True, slots=True)
class Composed:
    """An adapter that stands for a composition. data: [size_bytes] uint8."""

    manifest: Manifest
    data: npt.NDArray[np.uint8]


def compose(composition: Composition, members: Mapping[str, Member]) -> Composed:
    """Composes members, by their digests, on one base; in as much memory as their values take in float32.

    Raises:
        MeshError: FAILED_PRECONDITION (BASE_MISMATCH) for members of different bases, (ADAPTER_UNSUPPORTED)
            for what can't be composed, in words; RESOURCE_EXHAUSTED if the result would be too large.
    """
    digests = list(dict.fromkeys(leaf.name for leaf in leaves(composition)))
    first = members[digests[0]].manifest
    weighing = {leaf.name for leaf in fusions(composition)}
    for digest in digests:
        _check_member(digest, members[digest].manifest, first, is_fusion=digest in weighing)
    opened = {
        digest: Opened(members[digest].manifest.modules, _reader(members[digest])) for digest in digests
    }
    modules, tensors = compose_modules(composition, opened)
    copies = _copies([members[digest].manifest for digest in digests])
    return _write(composition, first, digests, modules, tensors, copies)


def compose_modules(
    composition: Composition, members: Mapping[str, Opened]
) -> tuple[list[ModuleOp], dict[str, tuple[int, Floats]]]:
    """The modules of a composition of members, by name, and their tensors, each with its layer, in float32.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for what can't be composed, in words;
            RESOURCE_EXHAUSTED if the result would be too large.
    """
    tree = _Tree(members)
    modules: list[ModuleOp] = []
    tensors: dict[str, tuple[int, Floats]] = {}
    room = MAX_COMPOSED_BYTES
    for layer, site in tree.places():
        found = tree.effect(composition, (layer, site))
        for module, values in _modules(layer, site, found) if found is not None else ():
            modules.append(module)
            tensors.update({module.tensors[slot]: (layer, value) for slot, value in values.items()})
            room -= sum(value.nbytes for value in values.values())
            # A fusion of a large base alone may have more: what is too much is not made first.
            if room < 0:
                raise MeshError(
                    Code.RESOURCE_EXHAUSTED,
                    Reason.OVERLOADED,
                    f"the composition would have more than {MAX_COMPOSED_BYTES} bytes",
                )
    if not modules:
        raise untaken("it changes nothing")
    return modules, tensors


class _Tree:
    """What the nodes of a composition do, place by place; every method raises as `compose_modules` does."""

    def __init__(self, members: Mapping[str, Opened]) -> None:
        self._members = members
        self._modules = {name: _by_place(member.modules) for name, member in members.items()}

    def places(self) -> list[_Place]:
        return _places([place for found in self._modules.values() for place in found])

    def effect(self, node: Composition, place: _Place) -> Effect | None:
        """What a node does at a place; None if nothing."""
        if isinstance(node, Leaf):
            modules = self._modules[node.name].get(place)
            if not modules:
                return None
            if modules[0].op == FUSION:
                raise untaken("a fusion acts only first in a fuse, on the adapters that follow it")
            return scaled(effect_of(modules, self._members[node.name].read), node.weight)
        found = self._group(node, place)
        return None if found is None else scaled(found, node.weight)

    def _group(self, node: Group, place: _Place) -> Effect | None:
        """A group's before its own weight."""
        if node.kind == FUSE:
            return self._fused(node, place)
        if node.kind == AVERAGE:
            total = sum(member.weight for member in node.members)
            shares = [
                (self.effect(replace(member, weight=1.0), place), member.weight / total)
                for member in node.members
            ]
            present = [(one, share) for one, share in shares if one is not None]
            return averaged(present) if present else None
        found = [one for member in node.members if (one := self.effect(member, place)) is not None]
        return stacked(found) if found else None

    def _fused(self, node: Group, place: _Place) -> Effect | None:
        """A member that is absent here takes no part."""
        first, *members = node.members
        if not isinstance(first, Leaf):
            raise untaken("what stands first in a fuse is no fusion")
        check_fuse(self._members[first.name].modules, len(members))
        effects = [(str(member), self.effect(member, place)) for member in members]
        found = [(name, effect) for name, effect in effects if effect is not None]
        modules = self._modules[first.name].get(place)
        if not found:
            return None
        if not modules:
            (name, _), (layer, site) = found[0], place
            raise untaken(
                f"'{name}' acts at layer {layer} '{site}', where its fusion has nothing: a fusion weighs "
                "bottlenecks, at the blocks where it was trained"
            )
        parts = [bottleneck_of(name, effect) for name, effect in found]
        return Effect(steps=(fused(modules[0], self._members[first.name].read, parts),))


def is_composed(manifest: Manifest) -> bool:
    """Whether it was composed where it is served, and is no version."""
    return manifest.source.format == COMPOSED_FORMAT


def identity_of(manifest: Manifest, digest: str) -> str:
    """The digest by which an adapter is asked for: its composition's, if it stands for one.

    `digest` is that of the manifest's bytes.
    """
    if not is_composed(manifest) or not manifest.composition:
        return digest
    try:
        return composition_digest(parse_resolved(str(manifest.composition.get(_EXPRESSION))))
    except MeshError:
        return digest


def _check_member(digest: str, manifest: Manifest, first: Manifest, *, is_fusion: bool) -> None:
    name = f"{manifest.namespace}/{manifest.name}"
    if manifest.base.digest != first.base.digest:
        raise base_mismatch(name, manifest.base.digest, first.base.digest)
    if is_fusion:
        if manifest.op_kinds != (FUSION,):
            raise untaken(f"'{name}' ({digest}) is no fusion: one has to stand first in a fuse")
        return
    if not manifest.servable:
        raise untaken(f"'{name}' ({digest}) can't be served itself: {manifest.unservable_reason}")
    if manifest.activation:
        raise untaken(f"'{name}' acts on a part of the tokens only, and is served alone")
    if any(module.op in (PROMPT, KV_PREFIX) for module in manifest.modules):
        raise untaken(f"'{name}' has virtual tokens, and is served alone")


def _copies(manifests: Sequence[Manifest]) -> dict[str, str]:
    """What the base has to have for all members: each was uploaded with a copy of it."""
    found: dict[str, str] = {}
    for manifest in manifests:
        for site, digest in manifest.same_as_base.items():
            if found.setdefault(site, digest) != digest:
                raise untaken(f"its members were trained on bases with different weights of {site}")
    return found


def _by_place(modules: Sequence[ModuleOp]) -> dict[_Place, list[ModuleOp]]:
    found: dict[_Place, list[ModuleOp]] = {}
    for module in modules:
        found.setdefault((module.layer, module.site), []).append(module)
    return found


def _places(places: Sequence[_Place]) -> list[_Place]:
    """Layer by layer; within one in the order in which the members name them."""
    known = {place: number for number, place in reversed(list(enumerate(places)))}
    return sorted(known, key=lambda place: (place[0], known[place]))


def _reader(member: Member) -> Callable[[str], Floats]:
    entries = {entry.name: entry for entry in member.manifest.tensors}
    return lambda name: to_float32(entries[name], tensor_view(entries[name], member.buffer))


def _modules(layer: int, site: str, effect: Effect) -> Iterator[tuple[ModuleOp, Mapping[str, Floats]]]:
    """An effect as modules and their tensors."""

    def named(op: str, values: Mapping[str, Floats], rank: int = 0, **more: Any) -> ModuleOp:
        names = {slot: f"L{layer}.{site}.{slot}" for slot in values}
        return ModuleOp(site, layer, op, rank, more.pop("scale", 1.0), names, "F32", **more)

    for module, given in effect.whole:
        yield replace(module, dtype="F32"), given
    if effect.lowrank:
        values = {
            "A": np.concatenate([part.a for part in effect.lowrank]),
            "B": np.concatenate([np.float32(part.scale) * part.b for part in effect.lowrank], axis=1),
        }
        yield named(LOWRANK, values, len(values["A"])), values
    vectors = {"in_scale": effect.in_scale, "out_scale": effect.out_scale, "bias_delta": effect.shift}
    values = {slot: vector for slot, vector in vectors.items() if vector is not None}
    if values:
        yield named(AFFINE, values), values
    yield from written(layer, site, effect.steps)


def _write(
    composition: Composition,
    first: Manifest,
    digests: Sequence[str],
    modules: Sequence[ModuleOp],
    tensors: Mapping[str, tuple[int, Floats]],
    copies: Mapping[str, str],
) -> Composed:
    specs = [TensorSpec(name, "F32", value.shape) for name, (_, value) in tensors.items()]
    layout = lay_out(specs, {"format": COMPOSED_FORMAT})
    data = np.zeros(layout.file_size, np.uint8)
    data[: len(layout.head)] = np.frombuffer(layout.head, np.uint8)
    for entry in layout.entries:
        value = np.ascontiguousarray(tensors[entry.name][1], "<f4")
        data[entry.offset : entry.offset + entry.size] = value.reshape(-1).view(np.uint8)
    spans = cut([(entry, tensors[entry.name][0]) for entry in layout.entries], layout.file_size)
    chunks = tuple(
        Chunk(span.offset, span.size, _digest(data[span.offset : span.offset + span.size]), span.layer)
        for span in spans
    )
    digest = composition_digest(composition)
    manifest = Manifest(
        namespace="composition",
        name=digest.removeprefix("sha256:")[:32],
        base=first.base,
        source=Source(COMPOSED_FORMAT, {}, {}, ()),
        kind="composition",
        op_kinds=tuple(sorted({module.op for module in modules})),
        modules=tuple(modules),
        tensors=layout.entries,
        chunks=chunks,
        size_bytes=layout.file_size,
        cost=Cost(
            sum(entry.size for entry in layout.entries), max((module.rank for module in modules), default=0)
        ),
        composition={_EXPRESSION: str(composition)},
        parents=tuple(digests),
        same_as_base=copies,
    )
    return Composed(manifest, data)


def _digest(data: npt.NDArray[np.uint8]) -> str:
    return "sha256:" + hashlib.sha256(data.data).hexdigest()
