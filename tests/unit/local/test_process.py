import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from adaptermesh.local.process import ChildProcess, exit_text, log_tail

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('up', flush=True)
time.sleep(600)
"""
PARENT = """
import asyncio, sys
from pathlib import Path
from adaptermesh.local.process import ChildProcess
async def main():
    child = await ChildProcess.start(("-c", "import time; time.sleep(600)"), {}, Path(sys.argv[1]))
    print(child.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    """Polls: another process is what changes."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_output_goes_to_the_log_and_the_environment_is_added(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    child = await ChildProcess.start(("-c", "import os; print(os.environ['WORD'])"), {"WORD": "hello"}, log)
    assert await child.wait() == 0
    assert log_tail(log) == "hello"


async def test_a_child_ends_on_sigterm(tmp_path: Path) -> None:
    child = await ChildProcess.start(("-c", "import time; time.sleep(600)"), {}, tmp_path / "x.log")
    assert await child.stop(30)
    assert child.exit_code == -signal.SIGTERM


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    child = await ChildProcess.start(("-c", STUBBORN), {}, log)
    await until(lambda: "up" in log_tail(log))
    assert not await child.stop(0.05)
    assert child.exit_code == -signal.SIGKILL


async def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path / "x.log"), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert is_running(pid)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    await until(lambda: not is_running(pid))


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert log_tail(log) == ""
    log.write_text("\n".join(str(number) for number in range(100_000)))
    assert log_tail(log, lines=2) == "99998\n99999"


def test_exit_codes_are_said_in_words() -> None:
    assert exit_text(3) == "exit code 3"
    assert exit_text(-9) == "killed by SIGKILL"
