"""Which attention an engine takes: over pages where something computes it right here, else by gathering.

A way is taken after it was tried: what an interface offers, the kernels behind it may refuse, by the card,
the dtype, the head's size or the page's.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from adaptermesh.core.errors import invalid_field
from adaptermesh.worker.engine.attention import ScoreRule, Span, StepAttention, plan_attention
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.paged_attention import PagedWay, plain_paged, plan_paged, tile_tokens
from adaptermesh.worker.engine.paged_varlen import reason_without_varlen, varlen_paged

log = logging.getLogger(__name__)

_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What the choice depends on. `caps` says that some layer caps its scores."""

    shape: KvShape
    heads: int
    dtype: torch.dtype
    device: torch.device
    caps: bool


class AttentionPlanner(Protocol):
    """Plans a step's attention; `way` is what computes it over pages, None for gathering."""

    way: PagedWay | None

    def __call__(self, spans: Sequence[Span], decodes: int) -> StepAttention: ...


class GatherPlanner:
    """Plans for `attention`."""

    def __init__(self, facts: AttentionFacts) -> None:
        self.way: PagedWay | None = None
        self._plan = functools.partial(
            plan_attention, block_tokens=facts.shape.block_tokens, dtype=facts.dtype, device=facts.device
        )

    def __call__(self, spans: Sequence[Span], decodes: int) -> StepAttention:
        return self._plan(spans, decodes)


class PagedPlanner:
    """Plans for `paged_attention`."""

    def __init__(self, facts: AttentionFacts, way: PagedWay) -> None:
        self.way: PagedWay | None = way
        self._plan = functools.partial(
            plan_paged,
            way=way,
            block_tokens=facts.shape.block_tokens,
            tile_tokens=tile_tokens(facts.heads, facts.shape.kv_heads),
            device=facts.device,
        )

    def __call__(self, spans: Sequence[Span], decodes: int) -> StepAttention:
        return self._plan(spans, decodes)


def choose_attention(choice: str, facts: AttentionFacts) -> AttentionPlanner:
    """By name, or "auto": on a CPU gathering; on CUDA the first way over pages that gives the right result.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD) for a way named that does not run here.
    """
    if choice == "gather" or (choice == "auto" and facts.device.type != "cuda"):
        return GatherPlanner(facts)
    reasons: list[str] = []
    for name, way in ways(facts, reasons).items():
        if choice not in ("auto", name):
            continue
        problem = trial(way, facts)
        if not problem:
            log.info("attention over pages", extra={"way": name})
            return PagedPlanner(facts, way)
        reasons.append(f"{name}: {problem}")
    if choice != "auto":
        raise invalid_field("attention", f"{choice!r} does not run here: {'; '.join(reasons)}")
    log.warning("attention gathers its keys, which is slower", extra={"reasons": reasons})
    return GatherPlanner(facts)


def ways(facts: AttentionFacts, reasons: list[str]) -> Mapping[str, PagedWay]:
    """The ways over pages that may run here, best first; `reasons` gets why the others can't."""
    found: dict[str, PagedWay] = {}
    lacking = reason_without_varlen() or ("varlen_attn can't cap scores" if facts.caps else "")
    if lacking:
        reasons.append(f"varlen: {lacking}")
    else:
        found["varlen"] = varlen_paged
    if find_spec("triton") is None:
        reasons.append("triton: it is not installed")
    else:
        from adaptermesh.worker.engine.paged_triton import triton_paged

        found["triton"] = triton_paged
    if facts.device.type != "cuda":
        found["plain"] = plain_paged
    return found


def trial(way: PagedWay, facts: AttentionFacts) -> str:
    """What is wrong with a way, by one small step of all kinds of rows; empty if nothing is."""
    shape = KvShape(1, facts.shape.kv_heads, facts.shape.head_dim, 8, facts.shape.block_tokens)
    page, device = shape.block_tokens, facts.device
    spans = [
        Span(page, 1, (3, 1)),
        Span(-1, 1, (2,)),
        Span(0, 1, (4,)),
        Span(page - 1, 2, (5, 6)),
        Span(0, 1, (7,)),
    ]
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cache = KvCache(shape, facts.dtype, device)
        cache.data.copy_(torch.randn(cache.data.shape))
        q = torch.randn(6, facts.heads, shape.head_dim).to(device, facts.dtype)
        plan = plan_paged(spans, 3, way, page, tile_tokens(facts.heads, shape.kv_heads), device)
        step = (q, cache.keys(0), cache.values(0), plan.rows, ScoreRule(shape.head_dim**-0.5, None), None)
        try:
            found, expected = way(*step).float(), plain_paged(*step).float()
        except Exception as error:  # noqa: BLE001 (a kernel's refusal has any type; it is reported)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return "its result is wrong"
    return ""
