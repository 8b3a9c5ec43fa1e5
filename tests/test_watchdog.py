"""When the watchdog speaks, by a clock that the test sets."""

import queue

import pytest

from deevisum_jax.watchdog import Watchdog


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def watchdog(clock, said):
    return Watchdog(said.append, clock)


def do(watchdog, clock, *durations_s, what="input"):
    """One after the other, of steps 1, 2 ..."""
    for step, taken_s in enumerate(durations_s, start=1):
        with watchdog.watching(what, step):
            clock.now += taken_s
            watchdog.look()


def parts(line: str) -> list[str]:
    """A line without the time of day in it."""
    return [line.split(", since ")[0], *line.split("; ")[1:]]


def test_what_is_as_long_as_usual_is_no_word_worth(watchdog, clock, said):
    do(watchdog, clock, 4, 5, 6, 49, 5)  # 10 x 5 s = 50 s
    assert said == []


def test_ten_times_as_long_as_usual_is(watchdog, clock, said):
    do(watchdog, clock, 4, 5, 6, 51)
    so_far, over = said
    assert parts(so_far) == [
        "the input of step 4 has taken 51 s so far",
        "usually it takes 5 s",
    ]
    assert over == "the input of step 4 is over, after 51 s"


def test_below_half_a_minute_nothing_is_far_longer(watchdog, clock, said):
    do(watchdog, clock, 0.1, 0.1, 0.1, 29)
    assert said == []
    do(watchdog, clock, 31)
    assert said[0].startswith("the input of step 1 has taken 31 s so far")


def test_it_is_said_again_at_twice_the_time_and_when_it_is_over(watchdog, clock, said):
    do(watchdog, clock, 1, 1, 1)
    with watchdog.watching("save", 7):
        clock.now += 599
        watchdog.look()
        assert said == []  # of saves nothing is known yet
    do(watchdog, clock, 1, 1, what="save")
    with watchdog.watching("save", 8):
        for _ in range(250):
            clock.now += 1
            watchdog.look()
    assert [line.split(" s ")[0] for line in said[:-1]] == [
        "the save of step 8 has taken 30", "the save of step 8 has taken 60",
        "the save of step 8 has taken 120", "the save of step 8 has taken 240",
    ]  # fmt: skip
    assert said[-1] == "the save of step 8 is over, after 250 s"


def test_the_first_steps_may_take_ten_minutes(watchdog, clock, said):
    do(watchdog, clock, 599, what="update")
    assert said == []
    do(watchdog, clock, 601, what="update")
    assert parts(said[0]) == ["the update of step 1 has taken 601 s so far"]


def test_one_long_step_does_not_become_the_usual(watchdog, clock, said):
    do(watchdog, clock, 1, 1, 1, 100, 1, 1, 31)
    assert "of step 4" in said[0]
    assert "of step 7" in said[2]


def test_it_is_over_also_when_it_fails(watchdog, clock, said):
    do(watchdog, clock, 1, 1, 1)

    def fail():
        with watchdog.watching("input", 9):
            clock.now += 40
            watchdog.look()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert said[-1] == "the input of step 9 is over, after 40 s"
    clock.now += 1000
    watchdog.look()  # nothing is being done
    assert len(said) == 2


def test_its_thread_looks_by_itself_and_ends(monkeypatch):
    monkeypatch.setattr("deevisum_jax.watchdog._LOOKS_S", 0.001)
    monkeypatch.setattr("deevisum_jax.watchdog._FIRST_S", 0.0)
    said = queue.Queue()
    with Watchdog(said.put) as watchdog, watchdog.watching("input", 1):
        assert said.get(timeout=60).startswith("the input of step 1 has taken 0 s so far")
    assert not watchdog._thread.is_alive()
