"""The gateway: the public edge of the mesh. No state, no tensors, no scheduling."""
