"""The two ends of a fetch: the source that has the bytes, the sink that takes them."""

from typing import Protocol

from adaptermesh.core.errors import MeshError


class AdapterSink(Protocol):
    """Takes one adapter's manifest, then the bytes of its tensor file in order. Callable from any thread.

    After any method has raised, and after `finish` or `fail`, every further call raises or is ignored.
    """

    def begin(self, manifest: bytes) -> None:
        """Takes the manifest.

        Raises:
            MeshError: DATA_LOSS (DATA_CORRUPT) if it isn't what the digest says; FAILED_PRECONDITION if it
                belongs to another base or can't be served; RESOURCE_EXHAUSTED (OVERLOADED) if there is no
                room now: the source just stops, the engine asks again when there is.
        """
        ...

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes; each chunk of the manifest is verified as soon as it is complete.

        Raises:
            MeshError: DATA_LOSS (DATA_CORRUPT) if a chunk isn't what the manifest says.
        """
        ...

    def finish(self) -> None:
        """Ends the file; raises MeshError DATA_CORRUPT if bytes are missing."""
        ...

    def fail(self, error: MeshError) -> None:
        """Ends the fetch: the requests that wait for it fail with this error, a later one fetches again."""
        ...


class AdapterSource(Protocol):
    """Where adapters come from when neither memory nor disk has them."""

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        """Starts a transfer into the sink and returns at once; `context` is the first waiting request's."""
        ...

    def cancel(self, digest: str) -> None:
        """Nobody waits for this digest any more. Returns at once; the sink may still be called."""
        ...
