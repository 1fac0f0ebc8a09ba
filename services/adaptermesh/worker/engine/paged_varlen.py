"""Paged attention by torch: `torch.nn.attention.varlen.varlen_attn` with a block table."""

import inspect
from typing import cast

import torch
from torch.nn.attention.varlen import varlen_attn

from adaptermesh.worker.engine.attention import ScoreRule
from adaptermesh.worker.engine.paged_attention import PagedRows


def reason_without_varlen() -> str:
    """Why this torch can't attend over pages; empty if its interface offers it.

    That it offers it does not mean that its kernels do: Flash Attention 2 takes pages of multiples of 256
    tokens at best, Flash Attention 3 any. So the one who chooses tries it.
    """
    lacking = {"block_table", "seqused_k", "enable_gqa"} - inspect.signature(varlen_attn).parameters.keys()
    return f"varlen_attn of this torch has no {', '.join(sorted(lacking))}" if lacking else ""


def varlen_paged(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    rule: ScoreRule,
    window: int | None,
) -> torch.Tensor:
    """The `PagedWay` of torch. It can't cap scores."""
    if rule.softcap is not None:
        raise ValueError("varlen_attn can't cap scores")
    out = varlen_attn(
        q,
        keys,
        values,
        rows.starts,
        None,
        rows.most_tokens,
        rows.most_keys,
        scale=rule.scaling,
        # How many tokens before itself a token sees; -1 and 0 is causal.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != keys.shape[2],
        seqused_k=rows.used,
        block_table=rows.table,
    )
    # Alone, unless one asks for more: that is what the annotation can't say.
    return cast("torch.Tensor", out)
