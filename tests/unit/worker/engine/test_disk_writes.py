"""Writing to the disk cache behind the requests."""

import threading
from pathlib import Path
from typing import Any

import torch

from adaptermesh.worker.engine.disk_cache import DiskCache
from adaptermesh.worker.engine.disk_writes import DiskWrites
from adaptermesh.worker.engine.host_arena import HostCopy


class Held(DiskCache):
    """A disk that takes nothing until it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def writer(self, digest: str, manifest: bytes) -> Any:
        self.entered.release()
        assert self.go.acquire(timeout=30)
        return super().writer(digest, manifest)


class Rig:
    def __init__(self, folder: Path) -> None:
        self.disk = Held(folder)
        self.lock = threading.Condition()
        self.written: list[str] = []
        self.writes = DiskWrites(self.disk, self.lock, lambda digest, _: self.written.append(digest))

    def start(self, adapter: Any) -> Any:
        data = torch.frombuffer(bytearray(adapter.data), dtype=torch.uint8)
        copy = HostCopy(adapter.manifest, data)
        with self.lock:
            return self.writes.start(adapter.digest, adapter.manifest.to_bytes(), copy)

    def start_and_evict(self, adapter: Any) -> None:
        """The adapter is evicted when its writing has begun and the disk has taken nothing yet."""
        self.start(adapter)
        assert self.disk.entered.acquire(timeout=30)
        with self.lock:
            self.writes.call_off(adapter.digest)

    def entries(self) -> set[str]:
        return {entry.digest for entry in self.disk.scan()}


def test_an_adapter_that_is_evicted_while_it_is_written_is_not_kept(lab: Any, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    adapter = lab.adapter(1, 4)
    rig.start_and_evict(adapter)
    rig.disk.go.release()
    rig.writes.close()
    assert rig.written == []
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_comes_again_is_written_once_more(lab: Any, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    adapter = lab.adapter(1, 4)
    rig.start_and_evict(adapter)
    rig.start(adapter)
    rig.disk.go.release(2)
    rig.writes.close()
    assert rig.written == [adapter.digest]
    assert rig.entries() == {adapter.digest}


def test_who_brings_more_than_the_disk_takes_writes_it_himself(lab: Any, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    adapters = [lab.adapter(seed, 4) for seed in range(1, 7)]
    late = [rig.start(adapter) for adapter in adapters]
    assert [one is not None for one in late] == [False] * 4 + [True] * 2
    rig.disk.go.release(len(adapters))
    for run in late[4:]:
        run()
    rig.writes.close()
    assert sorted(rig.written) == sorted(adapter.digest for adapter in adapters)
    assert rig.entries() == {adapter.digest for adapter in adapters}


def test_a_broken_disk_leaves_nothing_behind(lab: Any, tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"not a folder")
    rig.disk.go.release()
    rig.start(lab.adapter(1, 4))
    rig.writes.close()
    assert rig.written == []
    assert not rig.writes._writings
