"""`python -m adaptermesh.worker` runs one worker; its settings come from the environment."""

import sys

from adaptermesh.rpc.service import run
from adaptermesh.worker.service import WorkerService
from adaptermesh.worker.settings import WorkerSettings


def main() -> int:
    """Runs until SIGTERM; returns the exit code."""
    return run("worker", "adaptermesh.api.worker.v1.WorkerService", WorkerSettings(), WorkerService)


if __name__ == "__main__":
    sys.exit(main())
