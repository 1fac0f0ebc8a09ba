"""Which base a request runs on, given the workers that live. Pure."""

from collections.abc import Sequence

from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
from adaptermesh.router.resolution import Resolution
from adaptermesh.router.workers import Worker, WorkerState


def choose_base(workers: Sequence[Worker], allowed: frozenset[str] | None, retry_after: float) -> str:
    """The digest of the base that a bare base request runs on.

    Args:
        workers: the live ones.
        allowed: the digests that the request named; None is any.
        retry_after: what a refusal tells the caller to wait, in seconds.

    Raises:
        MeshError: UNAVAILABLE (NO_WORKER) if none of them is served; INVALID_ARGUMENT if several are.
    """
    served = served_bases(workers)
    fitting = served if allowed is None else served & allowed
    if len(fitting) == 1:
        return next(iter(fitting))
    if not fitting:
        wanted = "a base" if allowed is None else f"base {', '.join(sorted(allowed))}"
        raise unavailable(Reason.NO_WORKER, f"no live worker serves {wanted}", retry_after)
    raise invalid_field(
        "base_model", f"it is required, as a digest: several bases are served: {', '.join(sorted(fitting))}"
    )


def served_bases(workers: Sequence[Worker]) -> frozenset[str]:
    """The bases of the workers that take requests; of all of them if none does."""
    ready = frozenset(worker.info.base_digest for worker in workers if worker.state is WorkerState.READY)
    return ready or frozenset(worker.info.base_digest for worker in workers)


def check_served(
    workers: Sequence[Worker],
    resolution: Resolution,
    base_digest: str,
    *,
    may_return: bool,
    retry_after: float,
) -> None:
    """Tells a base that nobody serves from one that is between two workers.

    Raises:
        MeshError: UNAVAILABLE (NO_WORKER) if no worker lives, or if the base may be served again soon;
            FAILED_PRECONDITION (BASE_MISMATCH) if workers live but serve other bases only.
    """
    if any(worker.info.base_digest == base_digest for worker in workers):
        return
    if not workers or may_return:
        raise unavailable(
            Reason.NO_WORKER,
            f"no live worker serves base {base_digest}",
            retry_after,
            base_digest=base_digest,
        )
    served = ", ".join(sorted(served_bases(workers)))
    raise MeshError(
        Code.FAILED_PRECONDITION,
        Reason.BASE_MISMATCH,
        f"adapter '{resolution.ref}' was trained on base {base_digest}, which no worker serves; "
        f"served: {served}",
        metadata={"ref": resolution.ref, "adapter_base_digest": base_digest, "base_digest": served},
    )
