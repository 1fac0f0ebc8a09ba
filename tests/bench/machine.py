"""What the figures were measured on."""

import os
import platform
import subprocess
import time
from pathlib import Path

# What decides how fast matrices are multiplied on a CPU.
_TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "sha_ni",
)


def describe_machine() -> dict[str, object]:
    """CPU, cores, memory, kernel, Python."""
    facts = _cpu_facts()
    flags = set(facts.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cpu_family_model_stepping": "/".join(
            facts.get(key, "?") for key in ("cpu family", "model", "stepping")
        ),
        "flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def busy_cores(seconds: float = 3.0) -> float:
    """Cores that were busy for the next few seconds, on average: what goes on here without us."""
    before, start = _busy_ticks(), time.monotonic()
    time.sleep(seconds)
    ticks = _busy_ticks() - before
    return round(ticks / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start), 2)


def describe_commit(root: Path) -> str:
    """The commit that was measured; "+" if files differ from it. Empty outside of a repository."""
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+" if changed else commit


def _busy_ticks() -> int:
    """Clock ticks of all cores together that were not idle. See proc(5), /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return user + nice + system + irq + softirq + steal


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_facts() -> dict[str, str]:
    """The first CPU's lines of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
