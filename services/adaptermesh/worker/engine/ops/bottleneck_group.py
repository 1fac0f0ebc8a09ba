"""Several bottlenecks of one adapter at one place: one after the other, and fused.

Segment by segment in torch, on the CPU between two stages of the kernels. Sources: AdapterFusion
(arXiv:2005.00247), section 4; stacks as in MAD-X (arXiv:2005.00052), section 4.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.ops import SAME
from adaptermesh.worker.engine.ops.bottleneck import LoadedBottleneck, read_by
from adaptermesh.worker.engine.ops.op import TensorReader
from adaptermesh.worker.engine.ops.segment_op import SegmentBlockOp


@dataclass(frozen=True, slots=True)
class _Fusion:
    """query, key, value: [hidden, hidden]. query_bias: [hidden].

    A bias on the keys is not held: it adds the same to the scores of all members.
    """

    query: torch.Tensor
    query_bias: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor | None

    @classmethod
    def load(cls, module: ModuleOp, copy: TensorReader) -> "_Fusion | None":
        """Takes a module's; None if it fuses nothing."""
        names = module.tensors
        if "query" not in names:
            return None
        bias, value = (copy(names[slot]) if slot in names else None for slot in ("query_bias", "value"))
        return cls(copy(names["query"]), bias, copy(names["key"]), value)

    def weigh(self, x: torch.Tensor, ups: Sequence[torch.Tensor]) -> torch.Tensor:
        """x: what the members read; ups: what each of them adds. All: [tokens, hidden]."""
        # q . (key u) is (q key) . u: one product for all members.
        asked = (f.linear(x, self.query, self.query_bias) @ self.key).float()
        scores = torch.stack([(asked * up).sum(-1, keepdim=True) for up in ups])
        shares = scores.softmax(0).to(x.dtype)
        context = shares[0] * ups[0]
        for share, up in zip(shares[1:], ups[1:], strict=True):
            context.addcmul_(share, up)
        return context if self.value is None else f.linear(context, self.value)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        held = (self.query, self.query_bias, self.key, self.value)
        return (tensor for tensor in held if tensor is not None)


@dataclass(frozen=True, slots=True)
class _Step:
    """One bottleneck, or those that are fused."""

    members: list[LoadedBottleneck]
    fusion: _Fusion | None

    def term(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """output: [tokens, hidden], with what the steps before have added."""
        ups = [member.term(residual, output) for member in self.members]
        if self.fusion is None:
            return ups[0]
        return self.fusion.weigh(read_by(self.members[0].input, residual, output), ups)


@dataclass(frozen=True, slots=True)
class _Group:
    steps: list[_Step]

    def term(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What all steps add. residual, output: [tokens, hidden]."""
        added = self.steps[0].term(residual, output)
        for step in self.steps[1:]:
            added = added + step.term(residual, output + added)
        return added

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        for step in self.steps:
            for member in step.members:
                yield from member.tensors
            if step.fusion is not None:
                yield from step.fusion.tensors


class BottleneckGroup(SegmentBlockOp[_Group]):
    """The groups of all slots."""

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        """`modules` are in the order of their members, as manifests have them."""
        copy = self.copier(read)
        groups: dict[str, _Group] = {}
        for module in modules:
            steps = groups.setdefault(module.site, _Group([])).steps
            member = LoadedBottleneck.load(module, copy)
            if (module.options or {})["step"] == SAME:
                steps[-1].members.append(member)
            else:
                steps.append(_Step([member], _Fusion.load(module, copy)))
        for site, group in groups.items():
            self.hold(slot, site, layer, group)
