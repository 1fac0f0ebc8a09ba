"""Ed25519 keys in files, for signing; needs `cryptography`."""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from adaptermesh.artifact.signing import key_id_of, signed_message
from adaptermesh.core.errors import MeshError, invalid_field

_MAX_KEY_BYTES = 16 * 1024


class PrivateKey:
    """A private key. Neither its text nor an error shows it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> "PrivateKey":
        """A new one."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, place: Path) -> "PrivateKey":
        """Reads a PEM file without a password; raises MeshError INVALID_FIELD."""
        try:
            key = load_pem_private_key(_read(place), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # The cause might quote the file.
            raise _no_key(place, "an unencrypted private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _no_key(place, "an Ed25519 private key")
        return cls(key)

    @property
    def public_key(self) -> bytes:
        """The raw public key."""
        return self._key.public_key().public_bytes_raw()

    @property
    def key_id(self) -> str:
        return key_id_of(self.public_key)

    def sign(self, digest: str) -> bytes:
        """The signature of a version's digest."""
        return self._key.sign(signed_message(digest))

    def save(self, place: Path, public_place: Path) -> None:
        """Writes it as PEM, for its owner's eyes only, and the public key beside it; never over a file.

        Raises:
            MeshError: INVALID_FIELD if one of the files is there already.
        """
        private = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if public_place.exists():
            raise invalid_field("file", f"{public_place} is there already")
        _write(place, private, 0o600)
        _write(public_place, public, 0o644)


def load_public_key(place: Path) -> bytes:
    """The raw public key of a PEM file; raises MeshError INVALID_FIELD."""
    try:
        key = load_pem_public_key(_read(place))
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key(place, "a public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(place, "an Ed25519 public key")
    return key.public_bytes_raw()


def _read(place: Path) -> bytes:
    try:
        with place.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise invalid_field("key", f"{place} can't be read: {error.strerror}") from error


def _write(place: Path, data: bytes, mode: int) -> None:
    try:
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise invalid_field("file", f"{place} is there already") from None
    except OSError as error:
        raise invalid_field("file", f"{place} can't be written: {error.strerror}") from error
    with os.fdopen(file, "wb") as opened:
        opened.write(data)


def _no_key(place: Path, what: str) -> MeshError:
    return invalid_field("key", f"{place} holds no PEM of {what}")
