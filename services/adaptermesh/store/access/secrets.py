"""API keys as text: made, taken apart, and kept as hashes only.

A key is `amk_<8 characters>_<43 characters>`: the id by which it is known, and 256 random bits. What is kept
is scrypt of the whole key with a salt of its own (RFC 7914), with its parameters, so that they can grow.
"""

import base64
import hashlib
import hmac
import re
import secrets

_PREFIX = "amk_"
_ID_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
_KEY_ID = re.compile(r"amk_[a-z0-9]{8}")
_KEY = re.compile(r"(amk_[a-z0-9]{8})_[A-Za-z0-9_-]{43}")
# 16 MiB and some 50 ms each.
_COST, _BLOCK, _LANES = 2**14, 8, 1
_MEMORY = 64 * 2**20
_SALT_BYTES, _HASH_BYTES = 16, 32


def new_key() -> tuple[str, str]:
    """The id and the whole of a new key."""
    key_id = _PREFIX + "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
    return key_id, f"{key_id}_{secrets.token_urlsafe(32)}"


def key_id_of(key: str) -> str | None:
    """The id of what may be a key; None for what is none."""
    match = _KEY.fullmatch(key)
    return match.group(1) if match else None


def is_key_id(text: str) -> bool:
    """Whether a key can have this id."""
    return _KEY_ID.fullmatch(text) is not None


def hash_key(key: str) -> str:
    """What is kept of a key. Takes a while: not for the event loop."""
    salt = secrets.token_bytes(_SALT_BYTES)
    parts = (salt, _scrypt(key, salt, _COST, _BLOCK, _LANES))
    encoded = [base64.b64encode(part).decode() for part in parts]
    return "$".join(("scrypt", str(_COST), str(_BLOCK), str(_LANES), *encoded))


def is_key(key: str, kept: str) -> bool:
    """Whether what is kept was made of this key. Takes a while: not for the event loop."""
    _, cost, block, lanes, salt, expected = kept.split("$")
    made = _scrypt(key, base64.b64decode(salt), int(cost), int(block), int(lanes))
    return hmac.compare_digest(made, base64.b64decode(expected))


def _scrypt(key: str, salt: bytes, cost: int, block: int, lanes: int) -> bytes:
    return hashlib.scrypt(
        key.encode(), salt=salt, n=cost, r=block, p=lanes, maxmem=_MEMORY, dklen=_HASH_BYTES
    )
