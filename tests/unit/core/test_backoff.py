import random

from adaptermesh.core.backoff import Backoff


def test_delays_double_up_to_the_longest_and_each_is_in_its_upper_half() -> None:
    backoff = Backoff(0.1, 2.0, random.Random(1))
    for ceiling in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0):
        assert ceiling / 2 <= backoff.next_delay() <= ceiling


def test_a_success_starts_it_anew() -> None:
    backoff = Backoff(0.1, 2.0, random.Random(1))
    for _ in range(5):
        backoff.next_delay()
    backoff.reset()
    assert backoff.next_delay() <= 0.1


def test_a_very_long_outage_does_not_overflow() -> None:
    backoff = Backoff(0.1, 2.0, random.Random(1))
    assert all(backoff.next_delay() <= 2.0 for _ in range(3000))


def test_two_routers_do_not_come_back_at_one_moment() -> None:
    first, second = (Backoff(0.1, 2.0, random.Random(seed)) for seed in (1, 2))
    assert [first.next_delay() for _ in range(4)] != [second.next_delay() for _ in range(4)]
