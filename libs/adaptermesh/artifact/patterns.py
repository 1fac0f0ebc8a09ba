r"""Regular expressions from strangers, matched in time linear in the text.

Configs hold patterns that their library hands to a backtracking engine, where two of them can run for
hours. Here RE2 matches them. Only what RE2 and Python read alike is taken: look-around, back references,
named groups, flags and the escapes of one of the two are refused.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import re2

from adaptermesh.artifact.problems import shown

MAX_PATTERN_LENGTH = 512
_MAX_PROGRAM_BYTES = 1 << 20
_SIMPLE = re.compile(r"[A-Za-z0-9_.\-]+")
# Groups other than (?:...), POSIX classes, {,n}, possessive and doubled quantifiers, letters that escape
# differently: where the two syntaxes part.
_DIFFERENT = re.compile(r"\(\?(?!:)|\[:|\{,|[*+?}]\+|[*+?}]\*|[*+}?]\{|\?\?|\\(?![dDwWsSbB]|[^A-Za-z0-9])")


class PatternError(ValueError):
    """A pattern that is malformed, unsupported or too costly."""


@dataclass(slots=True)
class Budget:
    """Steps that matching may still take; shared by all patterns of one config."""

    steps: int = 50_000_000

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise PatternError("the patterns take too long to match")


Matcher = Callable[[str], bool]


def full_matcher(pattern: str, budget: Budget) -> Matcher:
    """A predicate: does the pattern match the whole text?

    Raises:
        PatternError: the pattern is malformed or not of the supported kind. The predicate raises it when the
            budget is spent.
    """
    return _matcher(pattern, pattern, budget)


def suffix_matcher(pattern: str, budget: Budget) -> Matcher:
    r"""A predicate: does `(.*\.)?(pattern)$` match the text from its start, as peft asks of its patterns?

    Raises:
        PatternError: as `full_matcher`.
    """
    if len(pattern) <= MAX_PATTERN_LENGTH and _SIMPLE.fullmatch(pattern):
        # No quantifier: the engine's own cost is at most the square of the text's length.
        tail = pattern.rpartition(".")[2]
        matches = re.compile(rf"(?:.*\.)?{pattern}").fullmatch

        def simple(text: str) -> bool:
            fits = text.endswith(tail) and len(text) <= MAX_PATTERN_LENGTH
            budget.spend(10 if fits else 1)
            return fits and matches(text) is not None

        return simple
    return _matcher(pattern, rf"(?:.*\.)?(?:{pattern})$", budget)


def _matcher(given: str, pattern: str, budget: Budget) -> Matcher:
    if len(given) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a pattern of {len(given)} characters is longer than {MAX_PATTERN_LENGTH}")
    if _DIFFERENT.search(given):
        raise PatternError(f"pattern {shown(given)}: only plain regular syntax is supported")
    try:
        # Alone first: one that is unbalanced could end the group it is put into.
        _python_accepts(given)
        _compiled(given)
        program = _compiled(pattern)
    except (re.error, re2.error, RecursionError, OverflowError, FutureWarning) as error:
        raise PatternError(f"pattern {shown(given)}: {_message(error)}") from None
    size = int(program.programsize)
    budget.spend(size)

    def matches(text: str) -> bool:
        budget.spend(size * (len(text) + 1))
        return program.fullmatch(text) is not None

    return matches


def _python_accepts(pattern: str) -> None:
    """What peft would do with it; a warning there means that its meaning is about to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        re.compile(pattern)


def _compiled(pattern: str) -> "re2._Regexp":
    options = re2.Options()
    options.max_mem = _MAX_PROGRAM_BYTES
    options.log_errors = False
    return re2.compile(pattern, options)


def _message(error: BaseException) -> str:
    text = error.args[0] if error.args else type(error).__name__
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
