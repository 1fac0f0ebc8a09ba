import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.router.bases import check_served, choose_base
from adaptermesh.router.catalogue import BaseModel
from adaptermesh.router.resolution import Resolution
from adaptermesh.router.workers import Load, Worker, WorkerState
from tests.unit.router.fakes import BASE, OTHER_BASE, version, worker_snapshot


def worker(base: BaseModel, state: WorkerState = WorkerState.READY) -> Worker:
    return Worker(worker_snapshot("w-" + base.model_id, base).info, state, Load(), 0.0)


def refusal(workers: list[Worker], allowed: frozenset[str] | None) -> MeshError:
    with pytest.raises(MeshError) as caught:
        choose_base(workers, allowed, 1.0)
    return caught.value


def test_the_only_served_base_needs_no_name() -> None:
    assert choose_base([worker(BASE), worker(BASE)], None, 1.0) == BASE.digest


def test_with_several_served_bases_one_must_be_named() -> None:
    workers = [worker(BASE), worker(OTHER_BASE)]
    error = refusal(workers, None)
    assert (error.code, error.metadata["field"]) == (Code.INVALID_ARGUMENT, "base_model")
    assert BASE.digest in error.message
    assert OTHER_BASE.digest in error.message
    assert choose_base(workers, frozenset((OTHER_BASE.digest,)), 1.0) == OTHER_BASE.digest


def test_a_name_that_means_several_served_bases_is_not_enough() -> None:
    error = refusal([worker(BASE), worker(OTHER_BASE)], frozenset((BASE.digest, OTHER_BASE.digest)))
    assert error.code is Code.INVALID_ARGUMENT


def test_a_base_whose_workers_all_drain_does_not_compete_with_one_that_takes_requests() -> None:
    workers = [worker(BASE), worker(OTHER_BASE, WorkerState.DRAINING)]
    assert choose_base(workers, None, 1.0) == BASE.digest


@pytest.mark.parametrize("allowed", [None, frozenset((OTHER_BASE.digest,))])
def test_a_base_that_nobody_serves_is_worth_a_retry(allowed: frozenset[str] | None) -> None:
    error = refusal([] if allowed is None else [worker(BASE)], allowed)
    assert (error.code, error.reason, error.retry_after) == (Code.UNAVAILABLE, Reason.NO_WORKER, 1.0)


def check(workers: list[Worker], may_return: bool = False) -> None:
    resolution = Resolution("acme/sql:v1", version("acme/sql", base=OTHER_BASE), None)
    check_served(workers, resolution, OTHER_BASE.digest, may_return=may_return, retry_after=1.0)


def test_an_adapter_whose_base_no_worker_serves_is_refused_with_both_digests() -> None:
    with pytest.raises(MeshError) as caught:
        check([worker(BASE)])
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert caught.value.metadata["adapter_base_digest"] == OTHER_BASE.digest
    assert caught.value.metadata["base_digest"] == BASE.digest


@pytest.mark.parametrize(("workers", "may_return"), [([], False), ([worker(BASE)], True)])
def test_an_adapter_whose_base_may_be_served_soon_is_worth_a_retry(
    workers: list[Worker], may_return: bool
) -> None:
    with pytest.raises(MeshError) as caught:
        check(workers, may_return)
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.NO_WORKER)


def test_a_draining_worker_still_serves_its_base() -> None:
    check([worker(OTHER_BASE, WorkerState.DRAINING)])
