"""JSON that is not what it should be: other values, hostile texts."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

huge_integers = st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**300, -1, -(2**63)])
odd_numbers = st.sampled_from([0, 1, -1, True, False, 0.5, -0.0, 1e308, 1e-320]) | huge_integers
odd_texts = st.sampled_from(
    ["", " ", "\0", "\u202e", "😀" * 40, "x" * 70_000, "../..", "None", "1", "ＡＢＣ"]
)
regular_expressions = st.sampled_from(
    ["(a+)+$", "(.*)*q_proj", "(" * 5000, "(?P<n>.*)(?P=n)+x", "q_proj{1,999999999}", "[", "\\", "(?i)Q_PROJ"]
)
scalars = st.none() | odd_numbers | odd_texts | regular_expressions | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["q_proj", "r", "", ".*", "default"]) | odd_texts, inner, max_size=4
        )
    ),
    max_leaves=8,
)


@st.composite
def hostile_json(draw: st.DrawFn, good: Mapping[str, Any], most: int) -> bytes:
    """JSON that a parser may choke on, of up to `most` bytes."""
    size = draw(st.sampled_from([most // 8, most]))
    key = json.dumps(draw(st.sampled_from(sorted(good)))).encode()
    text = json.dumps(good).encode()
    return draw(
        st.sampled_from(
            [
                b"[" * size,
                b'{"a":' * (size // 5),
                b'{"a":[' + b"[]," * (size // 3 - 3) + b"[]]}",
                b'{"a":[' + b"{}," * (size // 3 - 3) + b"{}]}",
                b'{"a":[' + b"1," * (size // 2 - 4) + b"1]}",
                b'{"a":[' + b"1e5," * (size // 4 - 4) + b"1]}",
                b'{"a":' + b"9" * (size - 8) + b"}",
                b'{"a":"' + b"\\u0041" * (size // 6 - 2) + b'"}',
                b"{" + b",".join(b'"%x":0' % n for n in range(size // 10)) + b"}",
                b"{" + b",".join(b'"%x":{}' % n for n in range(size // 12)) + b"}",
                text[:-1] + b"," + key + b":null}",
                text[:-1] + b',"a":NaN}',
                text[:-1] + b',"a":1e999}',
                text[:-1] + b',"\\ud800":1}',
                text[:-1] + b',"\xff\xfe":1}',
                text[:-1],
                text + text,
                text + b"\0",
                b"\xef\xbb\xbf" + text,
                text.decode().encode("utf-16"),
                b"null",
                b"[]",
                b'""',
                b"",
                b"{}",
            ]
        )
    )


@st.composite
def with_json_damage(draw: st.DrawFn, good: Mapping[str, Any]) -> Any:
    """A tree like `good` with something else in one or two places."""
    tree = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        place: Any = tree
        key: Any = draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            key = draw(
                st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
            )
        if draw(st.integers(0, 4)) == 0:
            del place[key]
            if not tree:
                break
        else:
            place[key] = draw(values)
    return tree
