"""Layers of the kernels in stages, for adapters with ops that the kernels don't know.

Between two stages such an op does its part in torch, on the kernels' own memory. Steps without one run whole.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from adaptermesh.worker.engine.native.library import SITES, STAGES, Kernels, Model, Step
from adaptermesh.worker.engine.slots import AdapterPlan

_SHARED = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}
"""The sites that read one x with others: their places in `Scratch.own`."""


class StagedLayers:
    """One step's layers. `hidden`: [tokens, hidden], the stream; `memory`: the scratch memory of `step`."""

    def __init__(
        self,
        kernels: Kernels,
        model: Model,
        step: Step,
        hidden: torch.Tensor,
        memory: torch.Tensor,
        plan: AdapterPlan,
    ) -> None:
        """`plan`: of the ops that the kernels don't know."""
        self._kernels, self._model, self._step, self._plan = kernels, model, step, plan
        self._hidden = hidden
        tokens, width, places = step.tokens, model.hidden, kernels.lay_out(model, step.tokens, memory)

        def view(place: int, *shape: int) -> torch.Tensor:
            start, size = (place - memory.data_ptr()) // 4, tokens * sum(shape)
            return memory[start : start + size].view(tokens, -1)

        q, kv = model.heads * model.dim, model.kv_heads * model.dim
        self._x = view(places.x, width)
        own = [view(places.own + 4 * n * tokens * width, width) for n in range(3)]
        qkv, inner = view(places.qkv, q, kv, kv), view(places.inner, model.inner)
        self._outputs = dict(zip("qkv", qkv.split((q, kv, kv), 1), strict=True))
        self._outputs |= {"o": self._x, "gate": inner, "up": view(places.upper, model.inner), "down": self._x}
        self._inputs = {"o": view(places.mixed, q), "down": inner}
        for site, place in _SHARED.items():
            scaled = step.scales.inputs[SITES.index(site)].values
            self._inputs[site] = own[place] if site in plan.inputs or scaled else self._x
        self._changed = self._find_changed()
        self._residual = hidden
        step.head = False
        step.moved = _bits(plan.inputs)
        step.apart = _bits(self._changed)
        self._hooks = self._find_hooks()

    def run(self, layers: range) -> None:
        step = self._step
        stops = sorted({*self._hooks, len(STAGES)})
        for layer in layers:
            step.first_layer, step.last_layer = layer, layer + 1
            begin = 0
            for stop in stops:
                step.first_stage, step.last_stage = begin, stop
                self._kernels.run(self._model, step)
                begin = stop
                if stop in self._hooks:
                    self._hooks[stop](layer)

    def _find_changed(self) -> tuple[str, ...]:
        """The sites whose outputs are changed here, those that join the stream among them."""
        plan = self._plan
        joined = {"attention": "o", "ffn": "down"}
        return tuple({*plan.sites, *(joined[block] for block in plan.blocks)})

    def _find_hooks(self) -> dict[int, Callable[[int], None]]:
        """What to do between stages, by how many of them went before."""
        stages: Sequence[tuple[str, Callable[[int], None], bool]] = (
            ("take_qkv", lambda layer: self._change(layer, "qkv"), self._moves("q", "k", "v")),
            ("qkv", lambda layer: self._apply(layer, "qkv"), self._changes("q", "k", "v")),
            ("attend", lambda layer: self._change(layer, "o"), self._moves("o")),
            ("o", lambda layer: self._beside(layer, "attention", "o"), self._changes("o")),
            (
                "join_attention",
                lambda layer: self._join(layer, "attention"),
                "attention" in self._plan.blocks,
            ),
            ("take_gated", lambda layer: self._change(layer, ("gate", "up")), self._moves("gate", "up")),
            ("gated", lambda layer: self._apply(layer, ("gate", "up")), self._changes("gate", "up")),
            ("activate", lambda layer: self._change(layer, ("down",)), self._moves("down")),
            ("down", lambda layer: self._beside(layer, "ffn", "down"), self._changes("down")),
            ("join_ffn", lambda layer: self._join(layer, "ffn"), "ffn" in self._plan.blocks),
        )
        return {STAGES.index(name) + 1: hook for name, hook, wanted in stages if wanted}

    def _moves(self, *sites: str) -> bool:
        return any(site in self._plan.inputs for site in sites)

    def _changes(self, *sites: str) -> bool:
        return any(site in self._changed for site in sites)

    def _change(self, layer: int, sites: Sequence[str]) -> None:
        for site in sites:
            if site in self._plan.inputs:
                held = self._inputs[site]
                held.copy_(self._plan.input_of(site, layer, held))

    def _apply(self, layer: int, sites: Sequence[str]) -> None:
        for site in sites:
            self._plan.apply(site, layer, self._inputs[site], self._outputs[site])

    def _beside(self, layer: int, block: str, site: str) -> None:
        self._apply(layer, (site,))
        if block in self._plan.blocks:
            self._residual = self._hidden.clone()

    def _join(self, layer: int, block: str) -> None:
        """After the kernels' own part of the block; the sub-layer's output is still where it was."""
        term = self._plan.term(block, layer, self._residual, self._x, self._hidden)
        if term is not None:
            self._hidden.add_(term)


def _bits(sites: Iterable[str]) -> int:
    return sum(1 << SITES.index(site) for site in sites)
