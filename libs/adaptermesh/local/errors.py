"""What goes wrong while the mesh runs as child processes."""


class LocalMeshError(Exception):
    """A problem with the local processes. `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
