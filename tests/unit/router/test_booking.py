from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.router.booking import Bookings
from adaptermesh.testing.clock import ManualClock

LIFETIME = 10.0


def test_a_booking_counts_until_its_worker_admits_the_request() -> None:
    bookings = Bookings(ManualClock(), LIFETIME)
    bookings.book("r1", "w1")
    bookings.book("r2", "w1")
    assert bookings.counts.get("w1", 0) == 2
    bookings.admitted("w1", ["r1", "somebody-elses"])
    assert bookings.counts.get("w1", 0) == 1
    bookings.admitted("w1", ["r2"])
    assert bookings.counts.get("w1", 0) == 0
    assert len(bookings) == 0


def test_another_worker_can_not_admit_it() -> None:
    bookings = Bookings(ManualClock(), LIFETIME)
    bookings.book("r1", "w1")
    bookings.admitted("w2", ["r1"])
    assert bookings.counts.get("w1", 0) == 1


def test_a_request_that_is_sent_again_is_booked_once() -> None:
    bookings = Bookings(ManualClock(), LIFETIME)
    bookings.book("r1", "w1")
    bookings.book("r1", "w2")
    assert (bookings.counts.get("w1", 0), bookings.counts.get("w2", 0)) == (0, 1)


def test_what_no_worker_admits_is_forgotten_after_its_lifetime() -> None:
    clock = ManualClock()
    bookings = Bookings(clock, LIFETIME)
    bookings.book("r1", "w1")
    bookings.expect("w1", "d1")
    clock.advance(4)
    bookings.book("r2", "w1")
    bookings.expect("w1", "d2")
    clock.advance(LIFETIME - 4)
    bookings.expire()
    assert bookings.counts.get("w1", 0) == 1
    assert "w1" not in bookings.expecting("d1")
    assert "w1" in bookings.expecting("d2")


def test_a_booking_made_anew_lives_anew() -> None:
    clock = ManualClock()
    bookings = Bookings(clock, LIFETIME)
    bookings.book("r1", "w1")
    bookings.expect("w1", "d1")
    bookings.book("r2", "w1")
    clock.advance(LIFETIME / 2)
    bookings.book("r1", "w1")
    bookings.expect("w1", "d1")
    clock.advance(LIFETIME / 2)
    bookings.expire()
    assert bookings.counts.get("w1", 0) == 1
    assert "w1" in bookings.expecting("d1")


def test_an_adapter_is_expected_until_the_worker_says_where_it_is() -> None:
    bookings = Bookings(ManualClock(), LIFETIME)
    bookings.expect("w1", "d1")
    assert "w1" in bookings.expecting("d1")
    assert "w2" not in bookings.expecting("d1")
    bookings.located("w1", "d1")
    assert "w1" not in bookings.expecting("d1")


def test_a_worker_that_is_gone_takes_its_bookings_along() -> None:
    bookings = Bookings(ManualClock(), LIFETIME)
    bookings.book("r1", "w1")
    bookings.book("r2", "w2")
    bookings.expect("w1", "d1")
    bookings.expect("w2", "d1")
    bookings.drop_worker("w1")
    assert (bookings.counts.get("w1", 0), bookings.counts.get("w2", 0)) == (0, 1)
    assert "w1" not in bookings.expecting("d1")
    assert "w2" in bookings.expecting("d1")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("book"), st.integers(0, 9), st.integers(0, 2)),
        st.tuples(st.just("admit"), st.integers(0, 9), st.integers(0, 2)),
        st.tuples(st.just("drop"), st.just(0), st.integers(0, 2)),
        st.tuples(st.just("wait"), st.integers(0, 12), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_counts_equal_those_of_a_plain_list_of_bookings(steps: list[tuple[str, int, int]]) -> None:
    clock = ManualClock()
    bookings = Bookings(clock, LIFETIME)
    plain: dict[int, tuple[int, float]] = {}
    for what, number, worker in steps:
        match what:
            case "book":
                bookings.book(f"r{number}", f"w{worker}")
                plain[number] = (worker, clock.now + LIFETIME)
            case "admit":
                bookings.admitted(f"w{worker}", [f"r{number}"])
                if plain.get(number, (None, 0.0))[0] == worker:
                    del plain[number]
            case "drop":
                bookings.drop_worker(f"w{worker}")
                plain = {key: value for key, value in plain.items() if value[0] != worker}
            case _:
                clock.advance(number)
        bookings.expire()
        plain = {key: value for key, value in plain.items() if value[1] > clock.now}
        assert len(bookings) == len(plain)
        for worker_number in range(3):
            wanted = sum(value[0] == worker_number for value in plain.values())
            assert bookings.counts.get(f"w{worker_number}", 0) == wanted
