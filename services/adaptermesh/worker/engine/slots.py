"""Device slots: which adapter is where on the device, and what it adds to a step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.ops.op import Op, SitePlan, StepTokens

BASE_SLOT = -1

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(slots=True)
class AdapterPlan:
    """What the adapters of one step do. Without tokens of adapters it does nothing."""

    tokens: StepTokens = field(default_factory=lambda: StepTokens(()))
    ops: Mapping[str, Op] = field(default_factory=dict)
    _sites: Mapping[str, tuple[SitePlan, ...]] | None = None

    @property
    def sites(self) -> Mapping[str, tuple[SitePlan, ...]]:
        """By site. Made when a forward first asks; the kernels read the ops themselves and never do."""
        if self._sites is None:
            found: dict[str, list[SitePlan]] = {}
            for op in self.ops.values() if self.tokens.active_slots else ():
                for site, plan in op.plan(self.tokens).items():
                    found.setdefault(site, []).append(plan)
            self._sites = {site: tuple(plans) for site, plans in found.items()}
        return self._sites

    def apply(self, site: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part at one site of one layer. x: [tokens, in]. y: [tokens, out], in place."""
        for plan in self.sites.get(site, ()):
            plan.apply(layer, x, y)


class DeviceSlots:
    """A fixed number of slots; each holds one adapter version or nothing."""

    def __init__(self, count: int, ops: Mapping[str, Op]) -> None:
        self._digests: list[str | None] = [None] * count
        self._ops = ops

    @property
    def size_bytes(self) -> int:
        return sum(op.size_bytes for op in self._ops.values())

    def digest(self, slot: int) -> str | None:
        return self._digests[slot]

    def load(self, slot: int, digest: str, manifest: Manifest, data: torch.Tensor) -> None:
        """Copies an adapter into an empty slot. data: [size_bytes] uint8, the canonical tensor file.

        Raises:
            MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for an op that this engine doesn't have.
        """
        if self._digests[slot] is not None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, f"slot {slot} is not empty")
        check_servable(digest, manifest, self._ops)
        entries = {entry.name: entry for entry in manifest.tensors}

        def read(name: str) -> torch.Tensor:
            entry = entries[name]
            raw = data[entry.offset : entry.offset + entry.size]
            return raw.view(_DTYPES[entry.dtype]).view(entry.shape)

        try:
            for kind, op in self._ops.items():
                op.load(slot, [module for module in manifest.modules if module.op == kind], read)
        except BaseException:
            self.unload(slot)
            raise
        self._digests[slot] = digest

    def unload(self, slot: int) -> None:
        """Empties a slot. The caller knows that no running row uses it."""
        self._digests[slot] = None
        for op in self._ops.values():
            op.unload(slot)

    def plan(self, tokens: StepTokens) -> AdapterPlan:
        """The adapters' part of a step."""
        return AdapterPlan(tokens, self._ops)

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
