"""For tests of the mesh, ours and its users': a running mesh with the demo adapters, and bounded polling."""

from adaptermesh.testing.polling import eventually
from adaptermesh.testing.rig import Rig, run_rig

__all__ = ["Rig", "eventually", "run_rig"]
