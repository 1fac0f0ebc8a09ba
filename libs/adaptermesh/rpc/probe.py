"""`python -m adaptermesh.rpc.probe HOST:PORT`: exits 0 if the health check there says SERVING."""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_SECONDS = 3.0


def probe(target: str) -> str:
    """Empty if the server at `target` is SERVING, else what is wrong."""
    with grpc.insecure_channel(target) as channel:
        # The stub types leave its methods out.
        check: Any = getattr(health_pb2_grpc.HealthStub(channel), "Check")  # noqa: B009
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            return f"{target}: {error}"
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return "" if serving else f"{target}: not serving"


if __name__ == "__main__":
    sys.exit(probe(sys.argv[1]) or 0)
