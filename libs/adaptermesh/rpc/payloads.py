"""Messages that are one large field of bytes, without the copies that protobuf would make of it.

On the wire they are what protobuf writes: anybody else's code reads and writes them as usual.
"""

from collections.abc import Callable
from typing import TypeVar

_LENGTH_DELIMITED = 2
_MOST_DIGITS = 5
"""Of a length below 2**35, seven bits each."""


_MessageT = TypeVar("_MessageT")


def payload_head(number: int, length: int) -> bytes:
    """What is in front of `length` bytes in a message that has just field `number`, 1 to 15."""
    head = bytearray((number << 3 | _LENGTH_DELIMITED,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


def encode_payload(number: int, data: bytes | memoryview) -> bytes:
    """A message that has field `number`, 1 to 15, of type bytes and no other."""
    return b"".join((payload_head(number, len(data)), data))


def decode_payload(number: int, message: bytes) -> memoryview | None:
    """The bytes of field `number` without a copy; None if that is not all of the message."""
    if not message or message[0] != number << 3 | _LENGTH_DELIMITED:
        return None
    length = 0
    for place, digit in enumerate(message[1 : 1 + _MOST_DIGITS]):
        length |= (digit & 0x7F) << 7 * place
        if digit <= 0x7F:
            data = memoryview(message)[place + 2 :]
            return data if len(data) == length else None
    return None


def serializer(serialize: Callable[[_MessageT], bytes]) -> Callable[[_MessageT | bytes], bytes]:
    """For a server that gives some messages as `encode_payload` made them."""

    def write(message: _MessageT | bytes) -> bytes:
        return message if isinstance(message, bytes) else serialize(message)

    return write


def payload_or(number: int, parse: Callable[[bytes], _MessageT]) -> Callable[[bytes], _MessageT | memoryview]:
    """Reads a message of just that field as its bytes, any other with `parse`."""

    def read(message: bytes) -> _MessageT | memoryview:
        data = decode_payload(number, message)
        return parse(message) if data is None else data

    return read
