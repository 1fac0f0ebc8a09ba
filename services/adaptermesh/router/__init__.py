"""The router: ref to exact version, request to worker."""
