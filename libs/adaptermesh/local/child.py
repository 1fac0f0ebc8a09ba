"""Becomes a service that ends when its parent ends. Run by path, so that it starts in no time.

`child.py PARENT_PID COMMAND...`: asks the kernel for SIGTERM on the parent's death, then becomes COMMAND.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Never returns."""
    parent, *command = arguments
    if sys.platform == "linux":
        # The request outlives exec, so no code of ours has to run inside a fork.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            # It died before we asked.
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606  # the command is the supervisor's own


if __name__ == "__main__":
    main(sys.argv[1:])
