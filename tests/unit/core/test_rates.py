"""How often a tenant may call, by a clock that stands still until it is moved."""

import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.rates import Rates
from adaptermesh.testing.clock import ManualClock


def test_a_tenant_may_call_so_many_times_and_then_as_time_goes_by() -> None:
    clock = ManualClock()
    rates = Rates(clock)
    for _ in range(6):
        rates.take("acme", 6)
    with pytest.raises(MeshError) as caught:
        rates.take("acme", 6)
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED)
    assert caught.value.retry_after == pytest.approx(10)
    rates.take("other", 6)
    clock.advance(10)
    rates.take("acme", 6)
    with pytest.raises(MeshError):
        rates.take("acme", 6)


def test_a_bucket_never_holds_more_than_a_minutes_calls() -> None:
    clock = ManualClock()
    rates = Rates(clock)
    rates.take("acme", 2)
    clock.advance(3600)
    for _ in range(2):
        rates.take("acme", 2)
    with pytest.raises(MeshError):
        rates.take("acme", 2)


def test_without_a_quota_nothing_is_counted() -> None:
    rates = Rates(ManualClock())
    for _ in range(1000):
        rates.take("acme", 0)


def test_many_tenants_do_not_grow_the_memory_without_bound() -> None:
    clock = ManualClock()
    rates = Rates(clock)
    for number in range(10_000):
        rates.take(f"t{number}", 60)
        clock.advance(0.1)
    assert len(rates._buckets) <= 4096  # what is bounded is not to be seen elsewhere
