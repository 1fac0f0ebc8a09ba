"""From tokens to text: whole characters only, and nothing that may still become a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_INCOMPLETE = "�"


class Detokenizer:
    """Turns a growing list of tokens into text that never has to be taken back.

    Only a short window is decoded anew for each token: from the last place where the text was complete. A
    window that ends in the replacement character holds a part of a character, so it waits for the next token.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0
        self._read = 0

    def push(self, token: int) -> str:
        """Takes a token, gives the text that is now complete."""
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """Gives the rest, an incomplete character as the replacement character."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if not final and (after.endswith(_INCOMPLETE) or len(after) <= len(before)):
            return ""
        # What a window decodes to may depend on its first token, so the last read ones stay in front.
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]


class StopFilter:
    """Cuts the text before the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes text, gives what is certain and whether a stop string was met."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain, False

    def flush(self) -> str:
        """Gives what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one request."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._filter = StopFilter(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """Takes a token, gives the text that is now certain and whether a stop string ended it."""
        return self._filter.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """Ends the text, gives the rest."""
        text, stopped = self._filter.push(self._detokenizer.flush())
        return text if stopped else text + self._filter.flush()


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
