"""Compiles the kernels: `python -m adaptermesh.worker.engine.native.build FOLDER` for all kinds of machine.

A library is named after its kind of machine and the digest of its sources and flags, so one of other sources
is never taken by mistake. Where nothing was built beforehand, the engine builds for its own machine when it
first starts.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent
BUILT = SOURCES / "built"
"""Libraries that came with the package."""

_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_TIMEOUT_SECONDS = 300.0

# Kinds of machine, best first: the compiler's name for each and the features of a CPU that it needs.
_V3 = frozenset({"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_X86: Mapping[str, frozenset[str]] = {"x86-64-v4": _V3 | _V4, "x86-64-v3": _V3}
_ARM = "armv8-a"


class NoKernels(Exception):
    """There are no kernels for this machine, and none can be built; the message says why."""


def machine_kind() -> str:
    """The kind of this machine; raises NoKernels if there are no kernels for it."""
    if sys.platform != "linux":
        raise NoKernels(f"they are for Linux, not {sys.platform}")
    machine = platform.machine()
    if machine == "aarch64":
        return _ARM
    if machine != "x86_64":
        raise NoKernels(f"there are none for {machine}")
    features = cpu_features()
    for kind, needed in _X86.items():
        if needed <= features:
            return kind
    raise NoKernels(f"the CPU lacks {', '.join(sorted(_V3 - features))}")


def find_library(folder: Path) -> Path:
    """The library for this machine: one that came with the package, or one of the folder, built if absent.

    Raises:
        NoKernels: There is none for this machine, and none can be built.
    """
    kind = machine_kind()
    name = library_name(kind)
    for place in (BUILT, folder):
        if (place / name).exists():
            return place / name
    return build(kind, folder)


def library_name(kind: str) -> str:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for file in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return f"kernels-{kind}-{digest.hexdigest()[:16]}.so"


def build(kind: str, folder: Path) -> Path:
    """Compiles for a kind of machine.

    Raises:
        NoKernels: There is no compiler, or it fails, or the folder can't be written.
    """
    compiler = next((found for name in ("c++", "g++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoKernels("there is no C++ compiler: install g++")
    target = folder / library_name(kind)
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Written beside its place and renamed: two processes may build at once, and none loads half a file.
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
            made = Path(scratch) / target.name
            _compile(compiler, kind, made)
            made.replace(target)
    except OSError as error:
        raise NoKernels(f"they can't be written to {folder}: {error}") from error
    return target


def _compile(compiler: str, kind: str, to: Path) -> None:
    command = [compiler, *_FLAGS, f"-march={kind}", "-o", str(to), str(SOURCES / "decoder.cpp")]
    try:
        done = subprocess.run(  # noqa: S603 (our own sources, a compiler of the system)
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{compiler} did not run to its end: {error}") from error
    if done.returncode != 0:
        raise NoKernels(f"{compiler} failed: {done.stderr.strip()[:2000]}")


def cpu_features() -> frozenset[str]:
    """What the system says that the CPU can do; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m adaptermesh.worker.engine.native.build [FOLDER]", file=sys.stderr)  # noqa: T201
        return 2
    folder = Path(arguments[0]) if arguments else BUILT
    kinds = (_ARM,) if platform.machine() == "aarch64" else tuple(_X86)
    try:
        for kind in kinds:
            print(os.fspath(build(kind, folder)))  # noqa: T201
    except NoKernels as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
