"""The disk cache on its own."""

from pathlib import Path
from typing import Any

import pytest

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.engine.disk_cache import DiskCache


def store(cache: DiskCache, adapter: Any) -> None:
    writer = cache.writer(adapter.digest, adapter.manifest.to_bytes())
    writer.write(adapter.data[:100])
    writer.write(adapter.data[100:])
    assert writer.commit()


def test_what_was_committed_is_found_again(lab: Any, tmp_path: Path) -> None:
    adapter = lab.adapter(1, 4)
    store(DiskCache(tmp_path), adapter)
    [entry] = DiskCache(tmp_path).scan()
    assert (entry.digest, entry.size_bytes) == (adapter.digest, len(adapter.data))
    cache = DiskCache(tmp_path)
    assert cache.manifest(adapter.digest) == adapter.manifest
    with cache.open(adapter.digest) as file:
        assert file.read() == adapter.data
    cache.delete(adapter.digest)
    assert cache.scan() == []


def test_half_written_and_foreign_entries_are_removed_at_start(lab: Any, tmp_path: Path) -> None:
    adapter = lab.adapter(1, 4)
    cache = DiskCache(tmp_path)
    writer = cache.writer(adapter.digest, adapter.manifest.to_bytes())
    writer.write(adapter.data[:100])
    (tmp_path / "something").mkdir()
    broken = tmp_path / adapter.digest.replace(":", "-")
    broken.mkdir()
    (broken / "manifest.json").write_bytes(b"{}")
    assert DiskCache(tmp_path).scan() == []
    assert list(tmp_path.iterdir()) == []
    writer.abort()


def test_an_aborted_entry_leaves_nothing(lab: Any, tmp_path: Path) -> None:
    adapter = lab.adapter(1, 4)
    cache = DiskCache(tmp_path)
    writer = cache.writer(adapter.digest, adapter.manifest.to_bytes())
    writer.write(adapter.data)
    writer.abort()
    writer.write(b"late")
    assert not writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_broken_disk_fails_nobody(lab: Any, tmp_path: Path) -> None:
    adapter = lab.adapter(1, 4)
    cache = DiskCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"not a folder")
    writer = cache.writer(adapter.digest, adapter.manifest.to_bytes())
    writer.write(adapter.data)
    assert not writer.commit()
    with pytest.raises(MeshError) as caught:
        cache.manifest(adapter.digest)
    assert caught.value.reason is Reason.DATA_CORRUPT
