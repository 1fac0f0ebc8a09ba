"""Device slots: which adapter is where on the device, and what it adds to a step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from adaptermesh.artifact.manifest import Manifest, ModuleOp
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.arrivals import DTYPES, Arrival, Copies, LayerWaits
from adaptermesh.worker.engine.ops.op import (
    BlockOp,
    BlockPlan,
    CapturableOp,
    CapturedOp,
    EdgeOp,
    HeadProduct,
    InputOp,
    InputPlan,
    Op,
    SitePlan,
    StepTokens,
    StreamOp,
    TensorReader,
    kind_of,
)
from adaptermesh.worker.engine.ops.virtual import WITHOUT_SITES

BASE_SLOT = -1

_Plan = TypeVar("_Plan", SitePlan, InputPlan, BlockPlan)


@dataclass(slots=True)
class AdapterPlan:
    """What the adapters of one step do. Without tokens of adapters it does nothing.

    `waits` is there while an adapter of the step is still on its way to the device.
    """

    tokens: StepTokens = field(default_factory=lambda: StepTokens(()))
    ops: Mapping[str, Op] = field(default_factory=dict)
    waits: LayerWaits | None = None
    _sites: Mapping[str, tuple[SitePlan, ...]] | None = None
    _inputs: Mapping[str, tuple[InputPlan, ...]] | None = None
    _blocks: Mapping[str, tuple[BlockPlan, ...]] | None = None

    @property
    def sites(self) -> Mapping[str, tuple[SitePlan, ...]]:
        """By site. Made when a forward first asks; the kernels read the ops themselves and never do."""
        if self._sites is None:
            active = self.ops.values() if self.tokens.active_slots else ()
            self._sites = _by_site(op.plan(self.tokens) for op in active)
        return self._sites

    @property
    def inputs(self) -> Mapping[str, tuple[InputPlan, ...]]:
        """By site, for those whose input is not the same for all."""
        if self._inputs is None:
            found = [op for op in self.ops.values() if isinstance(op, InputOp)]
            found.sort(key=lambda op: op.input_place)
            active = found if self.tokens.active_slots else ()
            self._inputs = _by_site(op.plan_inputs(self.tokens) for op in active)
        return self._inputs

    @property
    def blocks(self) -> Mapping[str, tuple[BlockPlan, ...]]:
        """By block site."""
        if self._blocks is None:
            found = [op for op in self.ops.values() if isinstance(op, BlockOp)]
            active = found if self.tokens.active_slots else ()
            self._blocks = _by_site(op.plan_blocks(self.tokens) for op in active)
        return self._blocks

    def input_of(self, site: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What goes into one site of one layer instead of x. x: [tokens, in], which stays as it is."""
        plans = self.inputs.get(site, ())
        if plans and self.waits is not None:
            self.waits.before(layer)
        for plan in plans:
            x = plan.change(layer, x)
        return x

    def apply(self, site: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part at one site of one layer. x: [tokens, in]. y: [tokens, out], in place."""
        if self.waits is not None:
            self.waits.before(layer)
        for plan in self.sites.get(site, ()):
            plan.apply(layer, x, y)

    def embed(self, ids: torch.Tensor, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """hidden: [tokens, hidden], the base's embeddings of `ids`, changed in place and given back."""
        for op in self._edge_ops():
            if op.embeds(self.tokens):
                if self.waits is not None:
                    self.waits.before(0)
                op.embed(self.tokens, ids, hidden, scale)
        return hidden

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [tokens, hidden], what goes into the first layer, changed in place and given back."""
        for op in self.ops.values() if self.tokens.active_slots else ():
            if isinstance(op, StreamOp) and op.enters(self.tokens):
                if self.waits is not None:
                    self.waits.before(0)
                op.enter(self.tokens, hidden)
        return hidden

    def head(
        self, normed: Callable[[torch.Tensor], torch.Tensor], product: HeadProduct, logits: torch.Tensor
    ) -> torch.Tensor:
        """logits: [outputs, vocabulary], the base's, changed in place and given back.

        Every layer has been waited for by then. For `normed` and `product` see `EdgeOp`.
        """
        for op in self._edge_ops():
            op.head(self.tokens, normed, product, logits)
        return logits

    def _edge_ops(self) -> Iterator[EdgeOp]:
        if self.tokens.active_slots:
            yield from (op for op in self.ops.values() if isinstance(op, EdgeOp))

    def term(
        self,
        block: str,
        layer: int,
        residual: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """What the ops add to the stream, one after the other, or None. All: [tokens, hidden]; they stay.

        `stream`: `residual + output`, unless other ops have added to it before.
        """
        plans = self.blocks.get(block, ())
        if not plans:
            return None
        if self.waits is not None:
            self.waits.before(layer)
        so_far = residual + output if stream is None else stream
        found = plans[0].term(layer, residual, output, so_far)
        for plan in plans[1:]:
            found = found + plan.term(layer, residual, output, so_far + found)
        return found


@dataclass(frozen=True, slots=True)
class CapturedSlots:
    """The adapters' part of recorded steps, over buffers that stay where they are."""

    ops: tuple[CapturedOp, ...]

    def plan(self, rows: int) -> AdapterPlan:
        """The part of the first `rows` rows."""
        return AdapterPlan(_sites=_by_site(op.plan(rows) for op in self.ops), _inputs={}, _blocks={})

    def fill(self, slots: Sequence[int], rows: int) -> None:
        """Writes a step: the slot of each row; the rows from there to `rows` have none."""
        for op in self.ops:
            op.fill(slots, rows)


@dataclass(slots=True)
class _Parts:
    """An adapter's modules by op and layer, and how many of its layers are loaded, or queued to be.

    `read` gives its tensors, out of `data`; there is none before the first layer.
    """

    manifest: Manifest
    modules: Mapping[tuple[str, int], Sequence[ModuleOp]]
    loaded: int = 0
    data: torch.Tensor | None = None
    read: TensorReader | None = None


class DeviceSlots:
    """A fixed number of slots; each holds one adapter version, maybe its first layers only, or nothing."""

    def __init__(self, count: int, layers: int, ops: Mapping[str, Op], copies: Copies | None = None) -> None:
        """`copies`: where adapters are copied beside the steps; None: at once, as on a CPU."""
        self._layers = layers
        self._digests: list[str | None] = [None] * count
        self._parts: list[_Parts | None] = [None] * count
        self._ops = ops
        self._copies = copies
        self._arrivals: dict[int, list[Arrival]] = {}
        self._capturable = {kind: op for kind, op in ops.items() if isinstance(op, CapturableOp)}

    @property
    def size_bytes(self) -> int:
        return sum(op.size_bytes for op in self._ops.values())

    @property
    def ops(self) -> Mapping[str, Op]:
        return self._ops

    def digest(self, slot: int) -> str | None:
        return self._digests[slot]

    def loaded(self, slot: int, digest: str) -> int:
        """How many of an adapter's leading layers are in a slot; 0 if it holds another one."""
        parts = self._parts[slot]
        return 0 if parts is None or self._digests[slot] != digest else parts.loaded

    def is_whole(self, slot: int, digest: str) -> bool:
        """Whether a slot holds all of an adapter."""
        return self._digests[slot] == digest and self.loaded(slot, digest) == self._layers

    def reserve(self, slot: int, digest: str, manifest: Manifest) -> None:
        """Gives an adapter an empty slot and the room that it takes there.

        Raises:
            MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for an op that this engine doesn't have.
        """
        if self._digests[slot] is not None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, f"slot {slot} is not empty")
        check_servable(digest, manifest, self._ops)
        modules: dict[tuple[str, int], list[ModuleOp]] = {}
        for module in manifest.modules:
            modules.setdefault((kind_of(module), module.layer), []).append(module)
        self._digests[slot] = digest
        self._parts[slot] = _Parts(manifest, modules)
        try:
            for kind, op in self._ops.items():
                op.reserve(slot, [module for module in manifest.modules if kind_of(module) == kind])
        except BaseException:
            self.unload(slot)
            raise

    def fill(self, slot: int, until: int, data: torch.Tensor) -> Arrival | None:
        """Copies the layers up to `until` that a reserved slot lacks; empties the slot if that fails.

        data: [size_bytes] uint8, the canonical tensor file; what lies behind those layers is not read.

        On a device of its own the copies are queued and the layers may be used at once: the steps wait for
        them there. The result tells when they are done; None: they are.
        """
        parts = self._parts[slot]
        if parts is None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, f"slot {slot} is not reserved")
        try:
            if self._copies is None:
                self._copy(slot, parts, until, data, None)
                return None
            with self._copies.begin() as arrival:
                self._copy(slot, parts, until, data, arrival)
            self._arrivals.setdefault(slot, []).append(arrival)
            return arrival
        except BaseException:
            self.unload(slot)
            raise

    def unload(self, slot: int) -> None:
        """Empties a slot. The caller knows that no running row uses it."""
        self._digests[slot] = self._parts[slot] = None
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
        return sum(op.layout for op in self._capturable.values())

    def rank_of(self, slots: Sequence[int]) -> int | None:
        """The largest rank of some slots, 0 if all are the base; None if their step can't be captured."""
        active = [slot for slot in slots if slot != BASE_SLOT]
        if any(kind not in self._capturable for slot in active for kind in self._kinds(slot)):
            return None
        return max((op.rank_of(active) for op in self._capturable.values()), default=0)

    def capture(self, rows: int, rank: int) -> CapturedSlots | None:
        """Buffers for steps of that many rows of at most that rank; None if steps can't be captured here."""
        found = [op.capture(rows, rank) for op in self._capturable.values()]
        captured = tuple(op for op in found if op is not None)
        return CapturedSlots(captured) if len(captured) == len(self._capturable) else None

    def await_arrivals(self, slots: Iterable[int]) -> None:
        """What is computed from now on waits for the adapters in these slots, whole."""
        for arrival in self._arriving(frozenset(slots)) if self._arrivals else ():
            arrival.wait_all()

    def check(self, rows: Iterable[tuple[int, str | None]], layers: int | None = None) -> None:
        """Asserts for each (slot, requested digest) that the slot holds that digest, and no digest is base.

        All of it, or its first `layers` layers.

        Raises:
            MeshError: INTERNAL. The step must not run: it would answer with another adapter or the base.
        """
        needed = self._layers if layers is None else layers
        for slot, digest in rows:
            held = None if slot == BASE_SLOT else self._digests[slot]
            if held != digest or (slot == BASE_SLOT) != (digest is None):
                raise MeshError(
                    Code.INTERNAL,
                    Reason.INTERNAL,
                    f"slot {slot} holds {held or 'nothing'}, the request asks for {digest or 'the base'}",
                    metadata={"digest": digest or ""},
                )
            if digest is not None and self.loaded(slot, digest) < needed:
                raise MeshError(
                    Code.INTERNAL,
                    Reason.INTERNAL,
                    f"slot {slot} holds {self.loaded(slot, digest)} of the {needed} layers to compute",
                    metadata={"digest": digest},
                )

    def _kinds(self, slot: int) -> frozenset[str]:
        """The kinds of op that act at sites which the adapter in a slot consists of."""
        parts = self._parts[slot]
        return frozenset() if parts is None else frozenset(kind for kind, _ in parts.modules) - WITHOUT_SITES

    def _copy(
        self, slot: int, parts: _Parts, until: int, data: torch.Tensor, arrival: Arrival | None
    ) -> None:
        read = self._reader(parts, data)
        for layer in range(parts.loaded, until):
            for kind, op in self._ops.items():
                op.load_layer(slot, layer, parts.modules.get((kind, layer), ()), read)
            if arrival is not None:
                arrival.landed(layer)
            parts.loaded = layer + 1
        if until == self._layers:
            # What it has staged on the device is not kept.
            parts.data = parts.read = None

    def _reader(self, parts: _Parts, data: torch.Tensor) -> TensorReader:
        """That of the layers before, unless another transfer of the same adapter brings the rest."""
        if parts.read is None or parts.data is not data:
            copies, manifest = self._copies, parts.manifest
            parts.data = data
            parts.read = _host_reader(manifest, data) if copies is None else copies.reader(manifest, data)
        return parts.read

    def _arriving(self, slots: frozenset[int]) -> list[Arrival]:
        """Those of the slots whose copies run; forgets the others."""
        running = (
            (slot, [arrival for arrival in arrivals if arrival.elapsed_ns() is None])
            for slot, arrivals in self._arrivals.items()
        )
        self._arrivals = {slot: arrivals for slot, arrivals in running if arrivals}
        return [arrival for slot in slots for arrival in self._arrivals.get(slot, ())]


def _by_site(parts: Iterable[Mapping[str, _Plan]]) -> Mapping[str, tuple[_Plan, ...]]:
    sites: dict[str, list[_Plan]] = {}
    for part in parts:
        for site, plan in part.items():
            sites.setdefault(site, []).append(plan)
    return {site: tuple(plans) for site, plans in sites.items()}


def _host_reader(manifest: Manifest, data: torch.Tensor) -> TensorReader:
    entries = {entry.name: entry for entry in manifest.tensors}
    # The file seen as one row of each dtype; tensors are aligned, so they begin at whole elements.
    rows = {
        name: data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
        for name, dtype in DTYPES.items()
    }

    def read(name: str) -> torch.Tensor:
        entry = entries[name]
        row, shape = rows[entry.dtype], entry.shape
        return row.as_strided(shape, _strides(shape), entry.offset // row.itemsize)

    return read


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[place + 1 :]) for place in range(len(shape))]


def check_servable(digest: str, manifest: Manifest, ops: Mapping[str, Op] | frozenset[str]) -> None:
    """Raises MeshError FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) unless each module's op is known."""
    reason = manifest.unservable_reason if not manifest.servable else ""
    unknown = sorted({module.op for module in manifest.modules if kind_of(module) not in ops})
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
