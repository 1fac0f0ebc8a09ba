"""The members of a merge: canonical files of low-rank adapters, read module by module."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest import Manifest, ModuleOp, TensorEntry
from adaptermesh.artifact.merging_arithmetic import Floats, Part
from adaptermesh.artifact.ops import LOWRANK
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter to merge: how messages name it, its digest and manifest, its verified canonical file."""

    ref: str
    digest: str
    manifest: Manifest
    tensors: Path


@dataclass(frozen=True, slots=True)
class _Shared:
    """Sites of one module that have the same A and the same scale, with the op that each has there."""

    ops: tuple[tuple[Site, ModuleOp], ...]

    @property
    def rank(self) -> int:
        return self.ops[0][1].rank


class OpenMember:
    """A member whose file is open, and its weight in the merge."""

    def __init__(self, member: Member, weight: float, file: BinaryIO) -> None:
        self._weight = weight
        self._digest = member.digest
        self._file = file
        self._ops = {(op.layer, op.site): op for op in member.manifest.modules}
        self._entries: Mapping[str, TensorEntry] = {entry.name: entry for entry in member.manifest.tensors}

    def rank(self, sites: Sequence[Site], layer: int) -> int:
        """The rank of its part at a module, 0 where it does nothing."""
        return sum(shared.rank for shared in self._shared(sites, layer))

    def part(self, sites: Sequence[Site], layer: int) -> Part | None:
        """Its delta at a module; None where it does nothing.

        The sites of a fused module are put together again: A's rows below each other, and B's columns beside
        each other, at the rows of their site. Sites that share A, as ingest makes them of a fused module,
        have it once.
        """
        found = self._shared(sites, layer)
        if not found:
            return None
        b = np.zeros((sum(site.out_features for site in sites), sum(one.rank for one in found)), np.float32)
        start = 0
        for shared in found:
            for site, op in shared.ops:
                rows = slice(site.out_offset, site.out_offset + site.out_features)
                b[rows, start : start + shared.rank] = self._read(op, "B")
            start += shared.rank
        return Part(
            a=np.concatenate([self._read(shared.ops[0][1], "A") for shared in found]),
            b=b,
            scales=np.repeat([shared.ops[0][1].scale for shared in found], [one.rank for one in found]),
            weight=self._weight,
            member=self._digest,
        )

    def _shared(self, sites: Sequence[Site], layer: int) -> list[_Shared]:
        groups: list[list[tuple[Site, ModuleOp]]] = []
        for site in sites:
            op = self._ops.get((layer, site.name))
            if op is None:
                continue
            group = next((group for group in groups if self._same_a(group[0][1], op)), None)
            if group is None:
                groups.append([(site, op)])
            else:
                group.append((site, op))
        return [_Shared(tuple(group)) for group in groups]

    def _same_a(self, one: ModuleOp, other: ModuleOp) -> bool:
        if (one.rank, one.scale, one.dtype) != (other.rank, other.scale, other.dtype):
            return False
        return np.array_equal(self._read(one, "A"), self._read(other, "A"))

    def _read(self, op: ModuleOp, slot: str) -> Floats:
        return tensor_from_file(self._entries[op.tensors[slot]], self._file)


@contextmanager
def opened(members: Sequence[tuple[Member, float]]) -> Iterator[tuple[OpenMember, ...]]:
    """Opens the files of all members, given with their weights."""
    with ExitStack() as stack:
        yield tuple(
            OpenMember(member, weight, stack.enter_context(member.tensors.open("rb")))
            for member, weight in members
        )


def check_members(members: Sequence[Member], base_digest: str, sites: SiteMap) -> None:
    """Refuses what can't be merged by adding low-rank deltas of one base.

    Raises:
        MeshError: FAILED_PRECONDITION (BASE_MISMATCH with both digests, or ADAPTER_UNSUPPORTED with the
            member and the op).
    """
    for member in members:
        manifest = member.manifest
        if manifest.base.digest != base_digest:
            raise base_mismatch(member.ref, manifest.base.digest, base_digest)
        if not manifest.servable:
            raise _unsupported(member, f"it can't be served either: {manifest.unservable_reason}")
        for what in ("activation", "head"):
            if getattr(manifest, what) is not None:
                raise _unsupported(member, f"it has a part that no weights hold: {what}")
        for op in manifest.modules:
            if op.op != LOWRANK:
                slots = ", ".join(op.tensors)
                where = f"layer {op.layer}, site '{op.site}'"
                raise _unsupported(member, f"it has the op '{op.op}' ({slots}) at {where}")
            if op.expert is not None or sites.get(op.site) is None:
                raise _unsupported(member, f"it acts on site '{op.site}', expert {op.expert}")


def _unsupported(member: Member, why: str) -> MeshError:
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.ADAPTER_UNSUPPORTED,
        f"'{member.ref}' can't be merged: {why}. Only adapters whose every op is '{LOWRANK}' are: a LoRA or "
        "what is exactly one, without DoRA and without a bias. Leave it out.",
        metadata={"ref": member.ref},
    )
