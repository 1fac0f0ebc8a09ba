"""Which library of kernels a machine takes, and how one is built where there is none."""

import mmap
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adaptermesh.worker.engine.native import build as building
from adaptermesh.worker.engine.native.build import NoKernels, build, find_library, library_name, machine_kind
from adaptermesh.worker.engine.native.library import Kernels, load_kernels
from adaptermesh.worker.engine.native.memory import page_memory

V3 = {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def set_machine(monkeypatch: pytest.MonkeyPatch, machine: str, features: set[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(building, "cpu_features", lambda: frozenset(features))


def put_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Makes a shell script the only compiler."""
    folder.mkdir()
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As from a package without libraries; gives the folder that they would be in."""
    monkeypatch.setattr(building, "BUILT", tmp_path / "package")
    return tmp_path / "package"


@pytest.mark.parametrize(
    ("machine", "features", "kind"),
    [
        ("x86_64", V4 | {"amx_tile"}, "x86-64-v4"),
        ("x86_64", V3 | {"sse4_2"}, "x86-64-v3"),
        ("x86_64", V4 - {"avx512vl"}, "x86-64-v3"),
        ("aarch64", set(), "armv8-a"),
    ],
)
def test_a_machine_is_of_the_best_kind_whose_features_it_has(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: set[str], kind: str
) -> None:
    set_machine(monkeypatch, machine, features)
    assert machine_kind() == kind


@pytest.mark.parametrize(
    ("machine", "features", "why"),
    [
        ("x86_64", V3 - {"avx2", "fma"}, "the CPU lacks avx2, fma$"),
        ("x86_64", V4 - {"movbe"}, "the CPU lacks movbe$"),
        ("riscv64", V4, "there are none for riscv64"),
    ],
)
def test_a_machine_without_kernels_is_told_why(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: set[str], why: str
) -> None:
    set_machine(monkeypatch, machine, features)
    with pytest.raises(NoKernels, match=why):
        machine_kind()


def test_there_are_no_kernels_for_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NoKernels, match="for Linux, not darwin"):
        machine_kind()


def test_the_features_are_those_that_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: x\n")
    assert building.cpu_features() == {"fpu", "avx2", "fma"}


def test_a_system_that_tells_no_features_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert building.cpu_features() == frozenset()


def test_without_a_compiler_the_reader_is_told_what_to_install(
    tmp_path: Path, nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoKernels, match=r"no C\+\+ compiler: install g\+\+"):
        find_library(tmp_path / "kernels")
    assert not (tmp_path / "kernels").exists()
    assert not nothing_built.exists()


def test_what_a_failing_compiler_says_is_passed_on(
    tmp_path: Path, nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_compiler(tmp_path / "bin", monkeypatch, "printf 'decoder.cpp: out of \\377 luck' >&2; exit 3")
    with pytest.raises(NoKernels, match=r"c\+\+ failed: decoder.cpp: out of . luck"):
        find_library(tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_compiler_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_compiler(tmp_path / "bin", monkeypatch, "exec tail -f /dev/null")
    monkeypatch.setattr(building, "_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(NoKernels, match="did not run to its end"):
        build("x86-64-v3", tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_compiler(tmp_path / "bin", monkeypatch, "exit 0")
    (tmp_path / "file").write_text("")
    with pytest.raises(NoKernels, match=r"can't be written to .*/file/kernels"):
        build("x86-64-v3", tmp_path / "file" / "kernels")


def test_a_library_of_other_sources_or_another_kind_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (*building.SOURCES.glob("*.h"), *building.SOURCES.glob("*.cpp")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = library_name("x86-64-v3")
    monkeypatch.setattr(building, "SOURCES", tmp_path)
    assert library_name("x86-64-v3") == before
    assert library_name("x86-64-v4") != before
    names = {before}
    for file in sorted(tmp_path.iterdir()):
        file.write_text(file.read_text() + "\n")
        names.add(library_name("x86-64-v3"))
    assert len(names) == 1 + len(list(tmp_path.iterdir()))
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, "-g"))
    assert library_name("x86-64-v3") not in names


def test_a_library_of_the_package_wins_over_the_folders_own(tmp_path: Path, nothing_built: Path) -> None:
    name = library_name(machine_kind())
    for folder in (nothing_built, tmp_path / "kernels"):
        folder.mkdir()
        (folder / name).write_bytes(b"")
    assert find_library(tmp_path / "kernels") == nothing_built / name
    (nothing_built / name).unlink()
    assert find_library(tmp_path / "kernels") == tmp_path / "kernels" / name


def test_a_library_that_is_broken_counts_as_none(tmp_path: Path, nothing_built: Path) -> None:
    nothing_built.mkdir()
    (nothing_built / library_name(machine_kind())).write_bytes(b"\x7fELF and no more")
    with pytest.raises(NoKernels, match="can't be loaded"):
        load_kernels(tmp_path)


def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from adaptermesh.worker.engine.native import build\n"
        "build._FLAGS = (*build._FLAGS, '-O0')\n"
        "print(build.build(build.machine_kind(), Path(sys.argv[1])))"
    )

    def run(_: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "kernels")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second
    # Nothing half made is left beside it.
    assert list((tmp_path / "kernels").iterdir()) == [Path(first.strip())]
    kernels = Kernels(Path(first.strip()))
    assert kernels.panels(kernels.panel + 1) == 2


@pytest.mark.parametrize("arguments", [["one", "two"], ["--help"], ["-o", "folder"]])
def test_the_command_tells_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert building.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_the_command_builds_every_kind_of_the_machine_and_prints_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_machine(monkeypatch, "x86_64", set())
    script = 'for word; do [ "$last" = -o ] && to=$word; last=$word; done; : > "$to"'
    put_compiler(tmp_path / "bin", monkeypatch, script)
    folder = tmp_path / "kernels"
    assert building.main([str(folder)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(folder / library_name(kind)) for kind in ("x86-64-v4", "x86-64-v3")]
    assert sorted(printed) == sorted(map(str, folder.iterdir()))


def test_the_command_fails_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert building.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: there is no C++ compiler: install g++\n"


def test_memory_comes_without_large_pages_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Small)
    assert torch.equal(page_memory(10), torch.zeros(10, dtype=torch.uint8))
    assert page_memory(0).shape == (0,)
