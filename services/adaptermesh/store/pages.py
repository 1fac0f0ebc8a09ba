"""Pages of a list. A page token is the key of the last item, so writes between two pages shift nothing."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from adaptermesh.core.digests import canonical_json
from adaptermesh.core.errors import invalid_field

T = TypeVar("T")
Key = tuple[str | int, ...]

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# In characters, roughly: a page must fit into one message.
_MAX_PAGE_LENGTH = 2**19


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page is asked for."""

    size: int = 0
    """[0, 1000]; 0 means 100."""
    token: str = ""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items and the token of the page after them; empty on the last one."""

    items: tuple[T, ...]
    next_token: str


class Pager(Generic[T]):
    """Reads and writes the tokens of one list.

    Args:
        request: the page asked for.
        scope: the list and its conditions; a token of another list or of other conditions is refused.
        key: the item's place in the order of the list.
        types: the types of the key's parts.
    """

    def __init__(
        self, request: PageRequest, scope: Sequence[Any], key: Callable[[T], Key], types: tuple[type, ...]
    ) -> None:
        if not 0 <= request.size <= MAX_PAGE_SIZE:
            raise invalid_field("page_size", f"must be in [0, {MAX_PAGE_SIZE}]")
        self._size = request.size or DEFAULT_PAGE_SIZE
        self._scope = hashlib.sha256(canonical_json(list(scope))).hexdigest()[:16]
        self._key = key
        self.after: Any = self._parse(request.token, types) if request.token else None
        """The key of the last item of the page before; None on the first page."""

    @property
    def limit(self) -> int:
        """How many items to read: one more than the page has tells whether it is the last."""
        return self._size + 1

    def page(self, items: Sequence[T]) -> Page[T]:
        """The page from at most `limit` items; shorter than asked for where items are large."""
        count, length = 0, 0
        for item in items[: self._size]:
            length += len(repr(item))
            if count and length > _MAX_PAGE_LENGTH:
                break
            count += 1
        if count == len(items):
            return Page(tuple(items), "")
        shown = tuple(items[:count])
        return Page(shown, self.token(self._key(shown[-1])))

    def token(self, key: Key) -> str:
        """The token of the page after a key."""
        return base64.urlsafe_b64encode(canonical_json([self._scope, *key])).decode()

    def _parse(self, token: str, types: tuple[type, ...]) -> Key:
        try:
            scope, *key = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        except (binascii.Error, ValueError, TypeError) as error:
            raise _bad_token() from error
        if scope != self._scope or [type(part) for part in key] != list(types):
            raise _bad_token()
        if not all(map(_can_be_asked, key)):
            raise _bad_token()
        return tuple(key)


def _can_be_asked(part: str | int) -> bool:
    """Whether every database takes it as a parameter; what a list gave was in one."""
    return "\0" not in part if isinstance(part, str) else 0 <= part < 2**31


def _bad_token() -> Exception:
    return invalid_field("page_token", "is not one that this list gave for these conditions")
