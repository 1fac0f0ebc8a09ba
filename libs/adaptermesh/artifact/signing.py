"""Ed25519 signatures over digests. Source: RFC 8032."""

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64

# Says what is signed, so that no signature made for something else can stand for one of a version.
_PURPOSE = b"adaptermesh.signature.v1:"


def signed_message(digest: str) -> bytes:
    """The bytes that a signature of a version is over."""
    return _PURPOSE + digest.encode("ascii")


def key_id_of(public_key: bytes) -> str:
    """The id of a raw public key."""
    return f"ed25519:{hashlib.sha256(public_key).hexdigest()[:16]}"


def is_public_key(public_key: bytes) -> bool:
    """Whether the bytes have the form of a raw public key."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        return False
    return True


def is_signature(public_key: bytes, signature: bytes, digest: str) -> bool:
    """Whether the key made the signature of the digest."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed_message(digest))
    except (InvalidSignature, ValueError):
        return False
    return True
