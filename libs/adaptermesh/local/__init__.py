"""`adaptermesh up`: the mesh as supervised child processes on this machine."""

from adaptermesh.local.config import DEFAULT_MODEL, LocalMeshConfig
from adaptermesh.local.errors import LocalMeshError
from adaptermesh.local.mesh import LocalMesh
from adaptermesh.local.plan import Endpoints, ServicePlan
from adaptermesh.local.supervisor import EventKind, MeshEvent

__all__ = [
    "DEFAULT_MODEL",
    "Endpoints",
    "EventKind",
    "LocalMesh",
    "LocalMeshConfig",
    "LocalMeshError",
    "MeshEvent",
    "ServicePlan",
]
