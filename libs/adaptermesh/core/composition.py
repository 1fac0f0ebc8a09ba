"""Compositions: several adapters in one request, as an expression over refs.

`0.5*acme/tone@prod`, `stack(acme/law:v2, 0.7*acme/tone:v1)`, `average(2*acme/a:v1, acme/b:v3)`, and such in
one another. In a stack the parts of all members act, each times its weight; in an average the weights are
first divided by their sum. A weight before a name or a group is a finite number; without one it is 1.

`fuse(acme/fusion:v1, acme/a:v1, acme/b:v2)` is AdapterFusion: first the fusion, then the adapters that it
weighs for each token, which have no weights of ours.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from adaptermesh.core.digests import digest_bytes, is_digest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import parse_ref

STACK = "stack"
AVERAGE = "average"
FUSE = "fuse"

MAX_LENGTH = 8192
MAX_MEMBERS = 16
MAX_DEPTH = 4
MAX_WEIGHT = 1000.0

_TOKEN = re.compile(r"\s*([(),*]|[^\s(),*]+)")
_NUMBER = re.compile(r"-?(\d{1,12}(\.\d{0,30})?|\.\d{1,30})(e[+-]?\d{1,3})?")
_GROUPS = (STACK, AVERAGE, FUSE)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One adapter: a ref, or in a resolved composition a digest."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return _weighted(self.weight, self.name)


@dataclass(frozen=True, slots=True)
class Group:
    """A stack or an average of at least one member, or a fusion's own leaf and at least one more."""

    kind: str
    members: "tuple[Leaf | Group, ...]"
    weight: float = 1.0

    def __str__(self) -> str:
        return _weighted(self.weight, f"{self.kind}({','.join(map(str, self.members))})")


Composition = Leaf | Group


def is_composition(text: str) -> bool:
    """Whether a text is meant as one, and not as a plain ref."""
    return "(" in text or "*" in text


def parse_composition(text: str, check: Callable[[str], object] = parse_ref) -> Composition:
    """Reads an expression; `str` of the result is its one spelling. `check` is called with every name.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_REF), or what `check` raises.
    """
    if len(text) > MAX_LENGTH:
        raise _bad(text, f"it has more than {MAX_LENGTH} characters")
    reader = _Reader(text, check)
    found = reader.node(0)
    reader.end()
    if sum(1 for _ in leaves(found)) > MAX_MEMBERS:
        raise _bad(text, f"it has more than {MAX_MEMBERS} adapters")
    return found


def parse_resolved(text: str) -> Composition:
    """Reads an expression over digests; raises MeshError INVALID_ARGUMENT (INVALID_REF)."""

    def check(name: str) -> None:
        if not is_digest(name):
            raise _bad(text, f"{name[:80]!r} is not a digest")

    return parse_composition(text, check)


def leaves(composition: Composition) -> Iterator[Leaf]:
    """The adapters, from left to right; one that is named twice comes twice."""
    if isinstance(composition, Leaf):
        yield composition
    else:
        for member in composition.members:
            yield from leaves(member)


def fusions(composition: Composition) -> Iterator[Leaf]:
    """Those of the leaves that stand first in a fuse: they are fusions, all others are adapters."""
    if isinstance(composition, Group):
        if composition.kind == FUSE:
            yield from leaves(composition.members[0])
        for member in composition.members:
            yield from fusions(member)


def renamed(composition: Composition, rename: Callable[[str], str]) -> Composition:
    """The same over other names, e.g. the digests that refs stand for."""
    if isinstance(composition, Leaf):
        return Leaf(rename(composition.name), composition.weight)
    return Group(
        composition.kind,
        tuple(renamed(member, rename) for member in composition.members),
        composition.weight,
    )


def composition_digest(composition: Composition) -> str:
    """The identity of a composition over digests: of its tree, its weights and its members."""
    return digest_bytes(f"composition {composition}".encode())


class _Reader:
    def __init__(self, text: str, check: Callable[[str], object]) -> None:
        self._text = text
        self._check = check
        self._tokens = _tokens(text)
        self._at = 0

    def node(self, depth: int) -> Composition:
        if depth > MAX_DEPTH:
            raise _bad(self._text, f"groups are in one another more than {MAX_DEPTH} deep")
        word, weight = self._word(), 1.0
        if self._peek() == "*":
            self._at += 1
            weight, word = self._weight(word), self._word()
        if self._peek() != "(":
            self._check(word)
            return Leaf(word, weight)
        if word not in _GROUPS:
            raise _bad(self._text, f"{word[:40]!r} is none of {', '.join(_GROUPS)}")
        self._at += 1
        members = [self.node(depth + 1)]
        while self._peek() == ",":
            self._at += 1
            members.append(self.node(depth + 1))
            if len(members) > MAX_MEMBERS:
                raise _bad(self._text, f"it has more than {MAX_MEMBERS} adapters")
        if self._peek() != ")":
            raise _bad(self._text, f"{word}( is not closed")
        self._at += 1
        if word == AVERAGE and not all(member.weight > 0 for member in members):
            raise _bad(self._text, "the weights of an average must be above 0")
        if word == FUSE:
            self._check_fuse(members)
        return Group(word, tuple(members), weight)

    def end(self) -> None:
        if self._at < len(self._tokens):
            raise _bad(self._text, f"{self._tokens[self._at][:40]!r} comes after its end")

    def _check_fuse(self, members: Sequence[Composition]) -> None:
        if len(members) < 2:
            raise _bad(self._text, "a fuse names first a fusion and then the adapters that it was trained on")
        if any(isinstance(member, Group) for member in members):
            raise _bad(self._text, "a fuse holds names only: what it weighs are adapters, one by one")
        if any(member.weight != 1.0 for member in members):
            raise _bad(
                self._text,
                "what a fuse holds has no weights, which its fusion was not trained with: "
                "give one to the whole, as in '0.5*fuse(...)'",
            )

    def _weight(self, word: str) -> float:
        weight = float(word) if _NUMBER.fullmatch(word) else math.nan
        if not abs(weight) <= MAX_WEIGHT:
            raise _bad(self._text, f"{word[:40]!r} is not a weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        return weight

    def _word(self) -> str:
        word = self._peek()
        if word is None or word in "(),*":
            raise _bad(self._text, f"a name is missing before {word!r}" if word else "it ends too early")
        self._at += 1
        return word

    def _peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None


def _tokens(text: str) -> list[str]:
    # Every character but white space at the end is part of a token.
    return [match.group(1) for match in _TOKEN.finditer(text.rstrip())]


def _weighted(weight: float, text: str) -> str:
    return text if weight == 1.0 else f"{weight!r}*{text}"


def _bad(text: str, why: str) -> MeshError:
    return MeshError(
        Code.INVALID_ARGUMENT,
        Reason.INVALID_REF,
        f"{text[:80]!r} is not a composition: {why}; write for example "
        "'stack(acme/law:v2, 0.5*acme/tone@prod)'",
        metadata={"ref": text[:256]},
    )
