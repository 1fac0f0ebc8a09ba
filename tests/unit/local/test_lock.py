import os
from pathlib import Path

import pytest

from adaptermesh.local import LocalMeshError
from adaptermesh.local.lock import HomeLock


def test_a_second_mesh_on_one_home_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    message = rf"already runs on .* \(process {os.getpid()}\)"
    with HomeLock(tmp_path), pytest.raises(LocalMeshError, match=message):
        HomeLock(tmp_path).__enter__()


def test_the_lock_can_be_taken_again_once_it_is_released(tmp_path: Path) -> None:
    with HomeLock(tmp_path):
        pass
    with HomeLock(tmp_path):
        pass


def test_what_a_killed_holder_left_in_the_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "up.lock").write_text('{"pid": 1')
    with HomeLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "up.lock").read_text()
