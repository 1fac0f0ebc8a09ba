"""Digests: `sha256:<64 lower-case hex digits>`, the identity of everything that is served."""

import hashlib
import json
import re
from typing import Any

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """The digest of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: a float is not finite.
        TypeError: a value has no JSON form.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_json(value: Any) -> str:
    """The digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value))
