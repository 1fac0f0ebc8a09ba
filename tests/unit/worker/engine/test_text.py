"""From tokens to text."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.worker.engine.text import Detokenizer, StopFilter, TextStream


def decode(tokens: Sequence[int]) -> str:
    """One token a byte; 256 and above are special and have no text."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def detokenize(tokens: Sequence[int]) -> tuple[list[str], str]:
    stream = Detokenizer(decode)
    return [stream.push(token) for token in tokens], stream.flush()


def test_a_character_of_four_tokens_comes_whole_with_its_last_one() -> None:
    pieces, rest = detokenize("a😀b".encode())
    assert pieces == ["a", "", "", "", "😀", "b"]
    assert rest == ""


def test_an_incomplete_character_at_the_end_is_shown_as_replaced() -> None:
    pieces, rest = detokenize("é".encode()[:1])
    assert (pieces, rest) == ([""], "�")


def test_special_tokens_have_no_text_and_break_nothing() -> None:
    pieces, rest = detokenize([256, *b"x", 257, *"ü".encode(), 256])
    assert "".join(pieces) + rest == "xü"


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    pieces, rest = detokenize(text.encode())
    assert "".join(pieces) + rest == text


def run_filter(text: str, stops: Sequence[str], size: int) -> tuple[str, bool]:
    stream = StopFilter(stops)
    out = ""
    for start in range(0, len(text), size):
        certain, stopped = stream.push(text[start : start + size])
        out += certain
        if stopped:
            return out, True
    return out + stream.flush(), False


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_ends_before_the_first_stop_string(size: int) -> None:
    assert run_filter("one two three", ["three", "tw"], size) == ("one ", True)


def test_what_may_begin_a_stop_string_is_held_back_and_given_later() -> None:
    stream = StopFilter(["</end>"])
    assert stream.push("a</e") == ("a", False)
    assert stream.push("x") == ("</ex", False)
    assert stream.push("</") == ("", False)
    assert stream.flush() == "</"


@settings(deadline=None)
@given(
    st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4)
)
def test_pieces_give_what_the_whole_text_gives(text: str, stops: list[str], size: int) -> None:
    found, stopped = run_filter(text, stops, size)
    ends = [text.find(stop) for stop in stops if stop in text]
    if size >= len(text):
        assert found == (text[: min(ends)] if ends else text)
    assert text.startswith(found)
    assert stopped == bool(ends)
    assert not any(stop in found for stop in stops)


def test_a_stop_string_may_begin_in_a_split_character() -> None:
    stream = TextStream(decode, ["é!"])
    out = []
    for token in b"caf" + "é!".encode():
        text, stopped = stream.push(token)
        out.append(text)
    assert "".join(out) == "caf"
    assert stopped
