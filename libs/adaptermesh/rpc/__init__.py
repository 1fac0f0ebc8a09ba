"""gRPC as the mesh speaks it: servers, channels, statuses, deadlines, health."""
