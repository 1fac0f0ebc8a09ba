"""`python -m adaptermesh.router`."""

import sys

from adaptermesh.router.service import GRPC_NAME, RouterService
from adaptermesh.router.settings import RouterSettings
from adaptermesh.rpc.service import run


def main() -> int:
    return run("router", GRPC_NAME, RouterSettings(), RouterService)


if __name__ == "__main__":
    sys.exit(main())
