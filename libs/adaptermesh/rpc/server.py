"""The gRPC server that every service runs: interceptors, health, reflection, channelz."""

from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from adaptermesh.rpc.channel import MAX_MESSAGE_BYTES
from adaptermesh.rpc.interceptors import Gate, ServerInterceptor
from adaptermesh.telemetry.tracing import Tracing

_AHEAD_BYTES = 256 * 1024
_CHANNELZ_NAME = "grpc.channelz.v1.Channelz"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where a server listens and what it accepts."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    grace_seconds: float = 5.0
    """How long running calls may go on after stop()."""


class MeshServer:
    """One listening gRPC server. Register servicers on `grpc` before start()."""

    def __init__(self, service_name: str, config: ServerConfig, tracing: Tracing) -> None:
        self._name = service_name
        self._more: list[str] = []
        self._channelz = True
        self._config = config
        self._interceptor = ServerInterceptor(tracing)
        self.grpc: grpc.aio.Server = grpc.aio.server(
            interceptors=(self._interceptor,),
            options=(
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                # Clients send one in 10 s; on a busy machine one may arrive late, and the next soon after it.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # What a client may send ahead of what is read. By itself gRPC would let it grow to some
                # megabytes for each stream, on a fast connection, whether anybody reads or not.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", _AHEAD_BYTES),
                # Two processes on one port would share its connections and confuse every client.
                ("grpc.so_reuseport", 0),
            ),
        )
        self._health = health.aio.HealthServicer()

    def guard(self, gate: Gate) -> None:
        """Has every call to the mesh's own services pass a gate first."""
        self._interceptor.gate = gate

    def hide_connections(self) -> None:
        """Leaves channelz out, which tells anybody who is connected from where."""
        self._channelz = False

    def show(self, service_name: str) -> None:
        """Has reflection show a further service."""
        self._more.append(service_name)

    async def start(self) -> int:
        """Binds and starts; returns the port. The health check says NOT_SERVING until `set_serving`.

        Raises:
            OSError: the address can't be bound.
        """
        await self.set_serving(False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        shown = [self._name, *self._more, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if self._channelz:
            channelz.add_channelz_servicer(self.grpc)
            shown.append(_CHANNELZ_NAME)
        reflection.enable_server_reflection(shown, self.grpc)
        address = f"{self._config.host}:{self._config.port}"
        try:
            port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"can't listen on {address}: {error}") from error
        await self.grpc.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """Sets what the health check answers."""
        response = health_pb2.HealthCheckResponse
        value = response.SERVING if serving else response.NOT_SERVING
        await self._health.set("", value)
        await self._health.set(self._name, value)

    async def stop(self, grace: float | None = None) -> None:
        """Stops taking calls and ends the running ones after `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(self._config.grace_seconds if grace is None else grace)
