"""The op table: what an adapter can do at a site, and the tensors each op needs. Data, not code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Op:
    """One row of the table.

    `slots` names the tensors an op must have, `optional` those it may have. `options` has for each choice
    that an op must make the values that it may take. Only a `served` op may stand in the modules of a
    servable manifest.
    """

    name: str
    slots: tuple[str, ...]
    optional: tuple[str, ...] = ()
    served: bool = False
    options: Mapping[str, frozenset[str]] = field(default_factory=dict)


LOWRANK = "lowrank"
AFFINE = "affine"
STRUCTURED = "structured"
BOTTLENECK = "bottleneck"
BOTTLENECK_GROUP = "bottleneck_group"
FUSION = "fusion"
REFT = "reft"
KV_PREFIX = "kv_prefix"
PROMPT = "prompt"
TOKEN_ROWS = "token_rows"  # noqa: S105 (rows of tokens, no secret)
REPLACE = "replace"
COUPLING = "coupling"

AFTER = "after"
"""The positions of a prompt's tokens begin after those of its prefix."""
START = "start"
"""They begin as without a prefix."""
FRONT = "front"
"""Virtual tokens come before all others."""

ACTIVATIONS = frozenset({"relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu", "linear"})
"""Of a bottleneck; `gelu` is the exact one, `gelu_new` its approximation by tanh."""
BOTTLENECK_INPUTS = frozenset({"output", "sum", "residual"})
"""What a bottleneck reads: the output of the sub-layer, that plus the stream before it, or the latter."""
NEXT = "next"
"""A bottleneck of a group begins a step: it reads what the steps before have added."""
SAME = "same"
"""It is fused with those before it in the step."""
MAX_FUSED = 15
"""Adapters that a fusion may weigh: with itself as many as a composition may name."""

MAX_POSITIONS = 1024
POSITIONS = frozenset(map(str, range(MAX_POSITIONS + 1)))
"""How many tokens at an end of a prompt a reft may act on."""

_ROWS = (
    # y += scale * B A x; A: [rank, in], B: [out, rank]. At the embeddings x is one-hot.
    Op(LOWRANK, ("A", "B"), served=True),
    # y = out_scale * (W (in_scale * x) + bias + lowrank) + scale * bias_delta; vectors of the site's widths.
    # magnitude, beside a lowrank s B A: out_scale is magnitude / |W + s B A| and leaves the bias alone.
    Op(AFFINE, (), ("in_scale", "out_scale", "bias_delta", "magnitude"), served=True),
    # Either y += scale * kron(w1, w2) x, of which the site has the rows from `out_offset mod o2` on;
    # w1: [o1, i1], w2: [o2, i2]. Or y = row_scale * W (x R) + b with R = R[factors - 1] ... R[0], each of
    # blocks for consecutive inputs, or one block for all of them, between an order of its own and back
    # (see `butterfly` of the engine); R: [factors, blocks, b, b], row_scale: [out], of ones if absent.
    Op(STRUCTURED, (), ("w1", "w2", "R", "row_scale"), served=True),
    # At a block site: stream += scale * (up act(down x + down_bias) + up_bias), x as the input says.
    # down: [width, hidden], up: [hidden, width].
    Op(
        BOTTLENECK,
        ("down", "down_bias", "up", "up_bias"),
        served=True,
        options={"activation": ACTIVATIONS, "input": BOTTLENECK_INPUTS},
    ),
    # One of several bottlenecks at one block site, which act in steps, in the order of `member`; a residual
    # input is the stream before the sub-layer all the same, the others hold what earlier steps have added.
    # A step is one bottleneck, or begins with one that has a query and goes on with those that say `same`:
    # with u[i] what each would add by itself, stream += value sum p[i] u[i], value being 1 if absent,
    # p = softmax of (query x + query_bias) . (key u[i] + key_bias) over i. The matrices: [hidden, hidden].
    Op(
        BOTTLENECK_GROUP,
        ("down", "down_bias", "up", "up_bias"),
        ("query", "query_bias", "key", "key_bias", "value"),
        served=True,
        options={
            "activation": ACTIVATIONS,
            "input": BOTTLENECK_INPUTS,
            "step": frozenset({NEXT, SAME}),
        },
    ),
    # At the block site `ffn`, for the first and the last tokens of a prompt; x is the stream after the layer:
    # stream += R^T (act(W x + b) - R x), without R x where nothing is subtracted. R, W: [rank, hidden], b:
    # [rank]. Those of the last tokens have slots of their own, unless they are the same.
    Op(
        REFT,
        (),
        ("R", "W", "b", "R_suffix", "W_suffix", "b_suffix"),
        served=True,
        options={
            "activation": ACTIVATIONS,
            "subtract": frozenset({"yes", "no"}),
            "prefix": POSITIONS,
            "suffix": POSITIONS,
        },
    ),
    # At every layer's attention: keys, not turned to a position, and values in front of the first token's.
    # k and v: [kv_heads, length, head_dim].
    Op(KV_PREFIX, ("k", "v"), served=True, options={"positions": frozenset({AFTER, START})}),
    # Embeddings in front of the first token's. E: [length, hidden].
    Op(PROMPT, ("E",), served=True, options={"place": frozenset({FRONT})}),
    # What fuses bottlenecks of other adapters at a block site, as a group's. It is told how many these are,
    # and whether its query is what they read or the output of the sub-layer.
    Op(
        FUSION,
        ("query", "key"),
        ("query_bias", "key_bias", "value"),
        options={
            "members": frozenset(map(str, range(1, MAX_FUSED + 1))),
            "query": frozenset({"input", "output"}),
        },
    ),
    # At the embeddings or the head, rows of their weight in place of the base's, for the module's tokens.
    # rows: [tokens, hidden].
    Op(TOKEN_ROWS, ("rows",), served=True),
    # A module's weight or bias, or both, in place of the base's. weight: [out, in], of a norm [hidden].
    Op(REPLACE, (), ("weight", "bias"), served=True),
    # What goes into the first layer, in halves a and b: a += F(b), then b += G(a), with two nets
    # up act(down x + down_bias) + up_bias. down: [width, half], up: [other half, width].
    Op(
        COUPLING,
        tuple(f"{net}_{slot}" for net in "FG" for slot in ("down", "down_bias", "up", "up_bias")),
        served=True,
        options={"activation": ACTIVATIONS},
    ),
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _ROWS})
"""Every op of the canonical form by its name."""
