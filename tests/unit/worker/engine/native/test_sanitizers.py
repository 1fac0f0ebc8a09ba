"""The kernels under the compiler's sanitizers: random models, adapters and batches, two callers at once."""

import shutil
import subprocess
from pathlib import Path

import pytest

from adaptermesh.worker.engine.native.build import SOURCES, machine_kind

# Plainly compiled: what is in bounds is so however it is computed, and the compiler is done sooner.
FLAGS = ("-std=c++17", "-O0", "-g", "-pthread", "-fno-sanitize-recover=all")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("sanitizers", "worlds", "longest"), [("address,undefined", 12, 600), ("thread", 10, 60)]
)
def test_random_batches_stay_in_bounds_and_equal_the_plain_formulas(
    tmp_path: Path, sanitizers: str, worlds: int, longest: int
) -> None:
    program, source = tmp_path / "worlds", Path(__file__).with_name("worlds.cpp")
    flags = (*FLAGS, f"-fsanitize={sanitizers}", f"-march={machine_kind()}", f"-I{SOURCES}")
    command = ["g++", *flags, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr:
        pytest.skip(f"needs g++ with its sanitizers: {sanitizers}")
    assert done.returncode == 0, done.stderr
    command = [str(program), str(worlds), str(longest)]
    # Leaks are looked for with ptrace, which containers forbid; the threads' pool is kept on purpose.
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(f"needs a kernel that lays memory out as g++'s sanitizer knows it: {sanitizers}")
    assert done.returncode == 0, done.stdout + done.stderr
