"""Adapters on their way into device slots: copied on a stream of their own, one event a layer.

A step that uses such an adapter waits on the device, layer by layer, so its first layers are computed while
the last ones are still being copied. On a CPU there is none of this.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import Code, MeshError, Reason

_LARGEST_HALF = torch.finfo(torch.float16).max
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Arrival(Protocol):
    """One adapter on its way."""

    def landed(self, layer: int) -> None:
        """What was queued so far completes a layer (of one op)."""
        ...

    def wait(self, layer: int) -> None:
        """What is queued for computing from now on waits for a layer."""
        ...

    def wait_all(self) -> None: ...

    def elapsed_ns(self) -> int | None:
        """How long the copies took; None while they run."""
        ...


class Copies(Protocol):
    """Where adapters are copied to the device."""

    def begin(self) -> contextlib.AbstractContextManager[Arrival]:
        """What is queued inside is queued behind all copies so far, and not behind the steps to come."""
        ...

    def reader(self, manifest: Manifest, data: torch.Tensor) -> "LayerReader": ...


class CudaArrival:
    """By CUDA events."""

    def __init__(self, layers: int) -> None:
        self._events: list[list[torch.cuda.Event]] = [[] for _ in range(layers)]
        self._first = torch.cuda.Event(enable_timing=True)
        self._last = torch.cuda.Event(enable_timing=True)
        self._first.record()

    def landed(self, layer: int) -> None:
        event = torch.cuda.Event()
        event.record()
        self._events[layer].append(event)

    def close(self) -> None:
        """All copies are queued."""
        self._last.record()

    def wait(self, layer: int) -> None:
        for event in self._events[layer]:
            event.wait()

    def wait_all(self) -> None:
        self._last.wait()

    def elapsed_ns(self) -> int | None:
        return int(self._first.elapsed_time(self._last) * 1e6) if self._last.query() else None


class CudaCopies:
    """A side stream of one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, layers: int) -> None:
        self._device = device
        self._layers = layers
        self._dtype = dtype
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def begin(self) -> Iterator[CudaArrival]:
        # The rows may be those of an adapter that the last step still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            arrival = CudaArrival(self._layers)
            yield arrival
            arrival.close()

    def reader(self, manifest: Manifest, data: torch.Tensor) -> "LayerReader":
        return LayerReader(manifest, data, self._device, self._dtype)


class LayerReader:
    """Gives an adapter's tensors on the device. The first one that is asked for of a layer brings all of it.

    The canonical file is ordered by layer, so that is one copy; casts and turns are then the device's work.
    """

    def __init__(
        self, manifest: Manifest, data: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._entries = {entry.name: entry for entry in manifest.tensors}
        self._host = data
        self._narrow = dtype is torch.float16
        self._staged = torch.empty(data.shape[0], dtype=torch.uint8, device=device)
        self._layer_of: dict[str, int] = {}
        self._ranges: dict[int, tuple[int, int]] = {}
        for module in manifest.modules:
            for name in module.tensors.values():
                entry = self._entries[name]
                low, high = self._ranges.get(module.layer, (entry.offset, entry.offset))
                self._ranges[module.layer] = min(low, entry.offset), max(high, entry.offset + entry.size)
                self._layer_of[name] = module.layer

    def __call__(self, name: str) -> torch.Tensor:
        span = self._ranges.pop(self._layer_of[name], None)
        if span is not None:
            self._staged[span[0] : span[1]].copy_(self._host[span[0] : span[1]], non_blocking=True)
        if self._narrow:
            _check_half(self._view(self._host, name))
        return self._view(self._staged, name)

    def _view(self, data: torch.Tensor, name: str) -> torch.Tensor:
        entry = self._entries[name]
        return data[entry.offset : entry.offset + entry.size].view(DTYPES[entry.dtype]).view(entry.shape)


class LayerWaits:
    """Makes one step wait for adapters under way, each layer once, in the order of the layers."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = arrivals
        self._next = 0

    def before(self, layer: int) -> None:
        """Before the first product of a layer."""
        while self._next <= layer:
            for arrival in self._arrivals:
                arrival.wait(self._next)
            self._next += 1


def _check_half(weight: torch.Tensor) -> None:
    """On the host: the device would have to be waited for. Only float16 is narrower than what is stored."""
    if weight.dtype is not torch.float16 and float(weight.abs().max()) > _LARGEST_HALF:
        raise too_large(torch.float16)


def too_large(dtype: torch.dtype) -> MeshError:
    """A weight that the computing dtype can't hold."""
    return MeshError(
        Code.FAILED_PRECONDITION, Reason.ADAPTER_UNSUPPORTED, f"a weight is too large for {dtype}"
    )
