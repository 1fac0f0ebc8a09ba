"""Device slots: which adapter is where on the device, and what it adds to a step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.arrivals import DTYPES, Arrival, Copies, LayerWaits
from adaptermesh.worker.engine.ops.op import (
    CapturableOp,
    CapturedOp,
    LayerLanded,
    Op,
    SitePlan,
    StepTokens,
    TensorReader,
    ignore_landed,
)

BASE_SLOT = -1


@dataclass(slots=True)
class AdapterPlan:
    """What the adapters of one step do. Without tokens of adapters it does nothing.

    `waits` is there while an adapter of the step is still on its way to the device.
    """

    tokens: StepTokens = field(default_factory=lambda: StepTokens(()))
    ops: Mapping[str, Op] = field(default_factory=dict)
    waits: LayerWaits | None = None
    _sites: Mapping[str, tuple[SitePlan, ...]] | None = None

    @property
    def sites(self) -> Mapping[str, tuple[SitePlan, ...]]:
        """By site. Made when a forward first asks; the kernels read the ops themselves and never do."""
        if self._sites is None:
            active = self.ops.values() if self.tokens.active_slots else ()
            self._sites = _by_site(op.plan(self.tokens) for op in active)
        return self._sites

    def apply(self, site: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part at one site of one layer. x: [tokens, in]. y: [tokens, out], in place."""
        if self.waits is not None:
            self.waits.before(layer)
        for plan in self.sites.get(site, ()):
            plan.apply(layer, x, y)


@dataclass(frozen=True, slots=True)
class CapturedSlots:
    """The adapters' part of recorded steps, over buffers that stay where they are."""

    ops: tuple[CapturedOp, ...]

    def plan(self, rows: int) -> AdapterPlan:
        """The part of the first `rows` rows."""
        return AdapterPlan(_sites=_by_site(op.plan(rows) for op in self.ops))

    def fill(self, slots: Sequence[int], rows: int) -> None:
        """Writes a step: the slot of each row; the rows from there to `rows` have none."""
        for op in self.ops:
            op.fill(slots, rows)


class DeviceSlots:
    """A fixed number of slots; each holds one adapter version or nothing."""

    def __init__(self, count: int, ops: Mapping[str, Op], copies: Copies | None = None) -> None:
        """`copies`: where adapters are copied beside the steps; None: at once, as on a CPU."""
        self._digests: list[str | None] = [None] * count
        self._ops = ops
        self._copies = copies
        self._arrivals: dict[int, Arrival] = {}
        self._capturable = [op for op in ops.values() if isinstance(op, CapturableOp)]

    @property
    def size_bytes(self) -> int:
        return sum(op.size_bytes for op in self._ops.values())

    def digest(self, slot: int) -> str | None:
        return self._digests[slot]

    def load(self, slot: int, digest: str, manifest: Manifest, data: torch.Tensor) -> Arrival | None:
        """Copies an adapter into an empty slot. data: [size_bytes] uint8, the canonical tensor file.

        On a device of its own the copies are queued and the slot may be used at once: the steps wait for
        them there. The result tells when they are done; None: they are.

        Raises:
            MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for an op that this engine doesn't have.
        """
        if self._digests[slot] is not None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, f"slot {slot} is not empty")
        check_servable(digest, manifest, self._ops)
        arrival: Arrival | None = None
        try:
            if self._copies is None:
                self._fill(slot, manifest, _host_reader(manifest, data), ignore_landed)
            else:
                with self._copies.begin() as arrival:
                    self._fill(slot, manifest, self._copies.reader(manifest, data), arrival.landed)
                self._arrivals[slot] = arrival
        except BaseException:
            self.unload(slot)
            raise
        self._digests[slot] = digest
        return arrival

    def unload(self, slot: int) -> None:
        """Empties a slot. The caller knows that no running row uses it."""
        self._digests[slot] = None
        self._arrivals.pop(slot, None)
        for op in self._ops.values():
            op.unload(slot)

    def plan(self, tokens: StepTokens) -> AdapterPlan:
        """The adapters' part of a step."""
        arriving = self._arriving(tokens.active_slots) if self._arrivals else []
        return AdapterPlan(tokens, self._ops, LayerWaits(arriving) if arriving else None)

    @property
    def layout(self) -> int:
        """Differs after whatever makes what was captured before wrong."""
        return sum(op.layout for op in self._capturable)

    def rank_of(self, slots: Sequence[int]) -> int | None:
        """The largest rank of some slots, 0 if all are the base; None if their step can't be captured."""
        active = [slot for slot in slots if slot != BASE_SLOT]
        if active and len(self._capturable) < len(self._ops):
            return None
        return max((op.rank_of(active) for op in self._capturable), default=0)

    def capture(self, rows: int, rank: int) -> CapturedSlots | None:
        """Buffers for steps of that many rows of at most that rank; None if steps can't be captured here."""
        found = [op.capture(rows, rank) for op in self._capturable]
        captured = tuple(op for op in found if op is not None)
        return CapturedSlots(captured) if len(captured) == len(self._ops) else None

    def await_arrivals(self, slots: Iterable[int]) -> None:
        """What is computed from now on waits for the adapters in these slots, whole."""
        for arrival in self._arriving(frozenset(slots)) if self._arrivals else ():
            arrival.wait_all()

    def check(self, rows: Iterable[tuple[int, str | None]]) -> None:
        """Asserts for each (slot, requested digest) that the slot holds that digest, and no digest is base.

        Raises:
            MeshError: INTERNAL. The step must not run: it would answer with another adapter or the base.
        """
        for slot, digest in rows:
            held = None if slot == BASE_SLOT else self._digests[slot]
            if held != digest or (slot == BASE_SLOT) != (digest is None):
                raise MeshError(
                    Code.INTERNAL,
                    Reason.INTERNAL,
                    f"slot {slot} holds {held or 'nothing'}, the request asks for {digest or 'the base'}",
                    metadata={"digest": digest or ""},
                )

    def _fill(self, slot: int, manifest: Manifest, read: TensorReader, landed: LayerLanded) -> None:
        for kind, op in self._ops.items():
            op.load(slot, [module for module in manifest.modules if module.op == kind], read, landed)

    def _arriving(self, slots: frozenset[int]) -> list[Arrival]:
        """Those of the slots whose copies run; forgets the others."""
        self._arrivals = {slot: one for slot, one in self._arrivals.items() if one.elapsed_ns() is None}
        return [arrival for slot, arrival in self._arrivals.items() if slot in slots]


def _by_site(parts: Iterable[Mapping[str, SitePlan]]) -> Mapping[str, tuple[SitePlan, ...]]:
    sites: dict[str, list[SitePlan]] = {}
    for part in parts:
        for site, plan in part.items():
            sites.setdefault(site, []).append(plan)
    return {site: tuple(plans) for site, plans in sites.items()}


def _host_reader(manifest: Manifest, data: torch.Tensor) -> TensorReader:
    entries = {entry.name: entry for entry in manifest.tensors}

    def read(name: str) -> torch.Tensor:
        entry = entries[name]
        raw = data[entry.offset : entry.offset + entry.size]
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)

    return read


def check_servable(digest: str, manifest: Manifest, ops: Mapping[str, Op] | frozenset[str]) -> None:
    """Raises MeshError FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) unless each module's op is known."""
    reason = manifest.unservable_reason if not manifest.servable else ""
    unknown = sorted({module.op for module in manifest.modules if module.op not in ops})
    if not reason and unknown:
        reason = f"this worker has no op {', '.join(unknown)}"
    if not reason and not manifest.modules:
        reason = "it changes nothing: no module of the base is touched"
    if reason:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ADAPTER_UNSUPPORTED,
            f"adapter {digest} can't be served: {reason}",
            metadata={"digest": digest},
        )
