"""Malformed uploads to a real store process, over gRPC, as many as the time allows.

Each is refused with a reason that names what is wrong, and leaves nothing; or it is legal after all, and then
is kept exactly as it was sent. Either way the process's memory grows by no more than a small multiple of what
was sent. The time that each kind takes is printed, not asserted.
"""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import load

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.rpc.status import mesh_error_from
from tests.integration.malformed_uploads import good, malformed
from tests.integration.sent_upload import CONFIG, WEIGHTS, Sent
from tests.integration.store_process import Place, StoreProcess, assert_whole

MIB = 2**20
FEW = 250
MANY = 4000
# Of the process while it takes one upload, beside what grows with the upload: code that is used for the first
# time, and what the allocator keeps.
FIXED_GROWTH = 48 * MIB
GROWTH_PER_BYTE = 16
REFUSALS = {
    Code.INVALID_ARGUMENT: {
        Reason.INVALID_UPLOAD,
        Reason.INVALID_FIELD,
        Reason.INVALID_NAME,
        Reason.ADAPTER_REJECTED,
        Reason.DIGEST_MISMATCH,
    },
    Code.FAILED_PRECONDITION: {Reason.BASE_MISMATCH},
    Code.NOT_FOUND: {Reason.BASE_NOT_FOUND, Reason.VERSION_NOT_FOUND},
}
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Costs:
    """The most that an upload of each kind has cost."""

    growth: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return "\n".join(
            f"{what}: {self.refused[what]} refused, {self.accepted[what]} accepted, at most "
            f"{self.growth[what] / MIB:.1f} MiB more and {self.seconds[what]:.2f} s of CPU"
            for what in sorted(self.refused | self.accepted)
        )


class Fuzzed:
    """A store process that is sent malformed uploads, one at a time."""

    def __init__(self, store: StoreProcess) -> None:
        self._store = store
        self._kept: set[str] = set()
        self.costs = Costs()

    async def take(self, sent: Sent) -> None:
        """Sends one and checks everything that must hold then."""
        messages = sent.messages()
        size = sum(message.ByteSize() for message in messages)
        before, seconds = self._reset_peak(), self._cpu_seconds()
        outcome = await self._send(messages)
        grown = self._memory("VmHWM") - before
        costs = self.costs
        costs.growth[sent.what] = max(costs.growth[sent.what], grown)
        costs.seconds[sent.what] = max(costs.seconds[sent.what], self._cpu_seconds() - seconds)  # type: ignore[assignment]
        if isinstance(outcome, MeshError):
            costs.refused[sent.what] += 1
            assert_names_what_is_wrong(outcome, sent)
        else:
            costs.accepted[sent.what] += 1
            assert_legal(sent)
            self._kept |= await assert_whole(self._store, outcome.version, dict(sent.files))
        assert grown <= FIXED_GROWTH + GROWTH_PER_BYTE * size, (sent, grown, size)
        await self._assert_nothing_more_is_left()

    async def _send(
        self, messages: list[store_pb2.UploadAdapterRequest]
    ) -> store_pb2.UploadAdapterResponse | MeshError:
        """Again, slower, if a refusal that crossed a message was lost (grpc/grpc#36066)."""
        for pause_seconds in (0.0, 0.01, 0.05, 0.2):
            try:
                return await self._store.stub.UploadAdapter(paced(messages, pause_seconds), timeout=60.0)
            except grpc.aio.AioRpcError as error:
                if error.details() != "Internal error from Core":
                    return mesh_error_from(error)
        raise AssertionError("the refusal never came")

    async def _assert_nothing_more_is_left(self) -> None:
        assert await asyncio.to_thread(lambda: list(self._store.place.staging.iterdir())) == []
        assert await asyncio.to_thread(self._store.place.blobs) == self._kept

    def _reset_peak(self) -> int:
        Path(f"/proc/{self._store.process.pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")

    def _memory(self, name: str) -> int:
        status = Path(f"/proc/{self._store.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._store.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


async def paced(
    messages: list[store_pb2.UploadAdapterRequest], pause_seconds: float
) -> AsyncIterator[store_pb2.UploadAdapterRequest]:
    for message in messages:
        yield message
        if pause_seconds:
            await asyncio.sleep(pause_seconds)


def assert_names_what_is_wrong(error: MeshError, sent: Sent) -> None:
    assert error.code in REFUSALS, (sent, error)
    assert error.reason in REFUSALS[error.code], (sent, error)
    assert 10 < len(error.message) <= 4096, (sent, error)
    assert error.message.replace("\n", " ").isprintable(), (sent, error)
    assert re.search(sent.about, error.message), (sent, error)


def assert_legal(sent: Sent) -> None:
    """By other readers than the store's own."""
    assert not sent.refused, sent
    config = json.loads(sent.files[CONFIG])
    assert isinstance(config, dict), sent
    for tensor in load(sent.files[WEIGHTS]).values():
        assert tensor.dtype.kind != "f" or np.isfinite(tensor).all(), sent


@contextmanager
def fuzzed(home: Path) -> Iterator[tuple[asyncio.Runner, Fuzzed]]:
    """A store with the base model; hypothesis calls plain functions, so the loop is run from outside."""
    with asyncio.Runner() as runner:
        store = runner.run(StoreProcess.start(Place(home)))
        try:
            runner.run(store.register())
            yield runner, Fuzzed(store)
        finally:
            store.kill()
            runner.run(store.gone())


def fuzz(home: Path, count: int) -> None:
    with fuzzed(home) as (runner, victim):
        # What is loaded with the first upload is nobody's cost.
        runner.run(victim.take(good(1)))

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(malformed())
        def holds(sent: Sent) -> None:
            runner.run(victim.take(sent))

        try:
            holds()
        finally:
            print(victim.costs)
        runner.run(victim.take(good(2)))
        assert victim.costs.accepted["good"] == 2


def test_a_malformed_upload_is_refused_with_the_reason_at_a_bounded_cost(tmp_path: Path) -> None:
    fuzz(tmp_path / "home", FEW)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_thousands_of_malformed_uploads_are_refused_with_the_reason_at_a_bounded_cost(tmp_path: Path) -> None:
    fuzz(tmp_path / "home", MANY)
