"""`python -m adaptermesh.gateway`."""

import sys

from adaptermesh.gateway.service import GatewayService
from adaptermesh.gateway.settings import GatewaySettings
from adaptermesh.rpc.service import run


def main() -> int:
    """Runs the gateway; returns the exit code."""
    return run("gateway", "adaptermesh.api.inference.v1.InferenceService", GatewaySettings(), GatewayService)


if __name__ == "__main__":
    sys.exit(main())
