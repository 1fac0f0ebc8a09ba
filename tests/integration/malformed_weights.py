"""Weights that are damaged: the safetensors container, the numbers, the set of tensors."""

import json
import re
import struct
from typing import Any

from hypothesis import strategies as st

from tests.integration.malformed_json import hostile_json, with_json_damage
from tests.integration.sent_upload import (
    DATA,
    GOOD,
    TENSOR_NAMES,
    TENSORS,
    WEIGHTS,
    Sent,
    dumped,
    joined,
)


@st.composite
def damaged_weights(draw: st.DrawFn) -> Sent:
    weights = draw(st.one_of(header_lengths(), header_trees(), header_texts(), cut_or_grown(), overlaps()))
    return Sent(
        "weights: container", {**GOOD, WEIGHTS: weights}, "safetensors|tensor|base_model|'", weights != b""
    )


@st.composite
def header_lengths(draw: st.DrawFn) -> bytes:
    text = dumped(TENSORS)
    true = len(text)
    wrong = st.sampled_from([0, 1, 2**63 - 1, 2**64 - 1, 8 * 2**20, 8 * 2**20 + 1, true + 8])
    length = draw((wrong | st.integers(0, 2 * true)).filter(lambda n: n != true))
    return joined(text, DATA, length)


@st.composite
def header_trees(draw: st.DrawFn) -> bytes:
    return joined(dumped(draw(with_json_damage(TENSORS).filter(lambda tree: tree != TENSORS))), DATA)


@st.composite
def header_texts(draw: st.DrawFn) -> bytes:
    return joined(draw(hostile_json(TENSORS, 8 * 2**20)), DATA)


@st.composite
def cut_or_grown(draw: st.DrawFn) -> bytes:
    whole = GOOD[WEIGHTS]
    cut = st.integers(0, len(whole) - 1).map(lambda end: whole[:end])
    grown = st.binary(min_size=1, max_size=50).map(lambda more: whole + more)
    other = st.binary(max_size=200)
    return draw(st.one_of(cut, grown, other))


@st.composite
def overlaps(draw: st.DrawFn) -> bytes:
    """Two tensors share bytes, or some belong to none."""
    tree = json.loads(json.dumps(TENSORS))
    one, other = draw(st.lists(st.sampled_from(TENSOR_NAMES), min_size=2, max_size=2, unique=True))
    shift = draw(st.sampled_from([-4, 4, 2**40, -(2**40)]))
    begin, end = tree[one]["data_offsets"]
    tree[one]["data_offsets"] = draw(
        st.sampled_from([tree[other]["data_offsets"], [begin + shift, end + shift], [end, begin]])
    )
    return joined(dumped(tree), DATA)


@st.composite
def not_finite(draw: st.DrawFn) -> Sent:
    at = 4 * draw(st.integers(0, len(DATA) // 4 - 1))
    bits = draw(st.sampled_from([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF]))
    data = DATA[:at] + struct.pack("<I", bits) + DATA[at + 4 :]
    return Sent(
        "weights: not finite", {**GOOD, WEIGHTS: joined(dumped(TENSORS), data)}, "finite|NaN|inf", True
    )


@st.composite
def other_tensors(draw: st.DrawFn) -> Sent:
    """A container that is whole, with tensors that are not those of the config."""
    tree: dict[str, Any] = {}
    data, rename = b"", draw(st.sampled_from(["", ".default", "x", "/../", "\u202e", "é" * 300]))
    chosen = set(draw(st.lists(st.sampled_from(TENSOR_NAMES), min_size=1, max_size=3)))
    how = draw(st.sampled_from(["drop", "rename", "layer", "turn", "dtype", "extra", "flat"]))
    for name, entry in TENSORS.items():
        begin, end = entry["data_offsets"]
        piece, shape, dtype = DATA[begin:end], entry["shape"], entry["dtype"]
        if name in chosen:
            if how == "drop":
                continue
            name = {
                "rename": name.replace(".weight", f"{rename}.lora_C.weight"),
                "layer": re.sub(r"layers\.\d+", f"layers.{draw(st.sampled_from([8, 99, 10**30]))}", name),
            }.get(how, name)
            shape = {"turn": shape[::-1], "flat": [len(piece) // 4]}.get(how, shape)
            dtype = draw(st.sampled_from(["I32", "U32"])) if how == "dtype" else dtype
        tree[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    if how == "extra":
        tree["lm_head.weight"] = {"dtype": "U8", "shape": [64], "data_offsets": [len(data), len(data) + 64]}
        data += b"\0" * 64
    return Sent(f"weights: {how}", {**GOOD, WEIGHTS: joined(dumped(tree), data)}, ".", True)
