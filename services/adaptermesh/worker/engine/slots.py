"""Device slots: which adapter is where on the device, and what it adds to a step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adaptermesh.artifact.manifest import Manifest, ModuleOp, TensorEntry
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.ops.op import Op, SitePlan, StepTokens

BASE_SLOT = -1

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What the adapters of one step do, by site. Empty for a batch of base rows."""

    sites: Mapping[str, tuple[SitePlan, ...]] = field(default_factory=dict)

    def apply(self, site: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part at one site of one layer. x: [tokens, in]. y: [tokens, out], in place."""
        for plan in self.sites.get(site, ()):
            plan.apply(layer, x, y)


@dataclass(slots=True)
class _Parts:
    """An adapter's modules by op and layer, its tensors by name, and how many of its layers are loaded."""

    modules: Mapping[tuple[str, int], Sequence[ModuleOp]]
    tensors: Mapping[str, TensorEntry]
    loaded: int = 0


class DeviceSlots:
    """A fixed number of slots; each holds one adapter version, maybe its first layers only, or nothing."""

    def __init__(self, count: int, layers: int, ops: Mapping[str, Op]) -> None:
        self._layers = layers
        self._digests: list[str | None] = [None] * count
        self._parts: list[_Parts | None] = [None] * count
        self._ops = ops

    @property
    def size_bytes(self) -> int:
        return sum(op.size_bytes for op in self._ops.values())

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
            modules.setdefault((module.op, module.layer), []).append(module)
        self._digests[slot] = digest
        self._parts[slot] = _Parts(modules, {entry.name: entry for entry in manifest.tensors})
        try:
            for kind, op in self._ops.items():
                op.reserve(slot, [module for module in manifest.modules if module.op == kind])
        except BaseException:
            self.unload(slot)
            raise

    def fill(self, slot: int, until: int, data: torch.Tensor) -> None:
        """Copies the layers up to `until` that a reserved slot lacks; empties the slot if that fails.

        data: [size_bytes] uint8, the canonical tensor file; what lies behind those layers is not read.
        """
        parts = self._parts[slot]
        if parts is None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, f"slot {slot} is not reserved")
        tensors = parts.tensors

        def read(name: str) -> torch.Tensor:
            entry = tensors[name]
            raw = data[entry.offset : entry.offset + entry.size]
            return raw.view(_DTYPES[entry.dtype]).view(entry.shape)

        try:
            for layer in range(parts.loaded, until):
                for kind, op in self._ops.items():
                    op.load_layer(slot, layer, parts.modules.get((kind, layer), ()), read)
                parts.loaded = layer + 1
        except BaseException:
            self.unload(slot)
            raise

    def unload(self, slot: int) -> None:
        """Empties a slot. The caller knows that no running row uses it."""
        self._digests[slot] = self._parts[slot] = None
        for op in self._ops.values():
            op.unload(slot)

    def plan(self, tokens: StepTokens) -> AdapterPlan:
        """The adapters' part of a step."""
        if not tokens.active_slots:
            return AdapterPlan()
        sites: dict[str, list[SitePlan]] = {}
        for op in self._ops.values():
            for site, plan in op.plan(tokens).items():
                sites.setdefault(site, []).append(plan)
        return AdapterPlan({site: tuple(plans) for site, plans in sites.items()})

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
