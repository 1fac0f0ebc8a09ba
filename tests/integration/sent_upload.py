"""An upload as it goes over the wire, with whatever is wrong with it."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptermesh.api.store.v1 import store_pb2
from tests.integration.store_process import adapter_files, upload_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
PIECE = 64 * 1024
NAME = "fuzzed"
# Small, so that the damage is most of it.
GOOD = adapter_files(0, rank=1)


@dataclass(frozen=True)
class Sent:
    """An upload as it goes over the wire."""

    what: str
    """The kind of damage."""
    files: Mapping[str, bytes]
    about: str = ""
    """A regular expression that the refusal's message must match."""
    refused: bool = False
    """It can't be legal."""
    header: Callable[[store_pb2.UploadHeader], None] = field(default=lambda _: None)
    """Changes the header."""
    stream: Callable[[list[store_pb2.UploadAdapterRequest]], list[store_pb2.UploadAdapterRequest]] = field(
        default=lambda messages: messages
    )
    """Changes the messages."""

    def messages(self) -> list[store_pb2.UploadAdapterRequest]:
        header = upload_header(NAME, dict(self.files))
        self.header(header)
        found = [store_pb2.UploadAdapterRequest(header=header)]
        for data in self.files.values():
            pieces = (data[start : start + PIECE] for start in range(0, len(data), PIECE))
            found += [store_pb2.UploadAdapterRequest(data=piece) for piece in pieces]
        return self.stream(found)

    def __repr__(self) -> str:
        sizes = {path[:40]: len(data) for path, data in self.files.items()}
        return f"Sent({self.what!r}, {sizes}, refused={self.refused})"[:1000]

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What hypothesis prints, instead of the bytes."""
        printer.text(repr(self))


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def dumped(value: object) -> bytes:
    """JSON with the numbers that JSON lacks, and lone surrogates as they are."""
    return json.dumps(value, ensure_ascii=True).encode()


TENSORS, DATA = split(GOOD[WEIGHTS])
TENSOR_NAMES = sorted(TENSORS)
SETTINGS: dict[str, Any] = json.loads(GOOD[CONFIG])
