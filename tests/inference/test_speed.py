"""Shares of time, on clocks that tests wind themselves."""

import dataclasses
import json

import pytest

from deevisum_jax.inference import speed
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.speed import Saved, Speed


class Machine:
    """Takes as long for a run as it is told to, and remembers what it ran."""

    def __init__(self, monkeypatch):
        self.now = {"wall": 100.0, "cpu": 7.0}
        self.ran = []
        clocks = {name: lambda name=name: self.now[name] for name in self.now}
        monkeypatch.setattr(speed, "CLOCKS", clocks)

    def run(self, name, wall, cpu):
        self.ran.append(name)
        self.now["wall"] += wall
        self.now["cpu"] += cpu

    def way(self, name, walls, cpus):
        """The first of each is the run that compiles."""
        walls, cpus = iter(walls), iter(cpus)
        return lambda: self.run(name, next(walls), next(cpus))


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_a_round_is_held_against_the_plain_runs_around_it(machine):
    plain = machine.way("plain", [99, 2, 6, 10], [99, 4, 4, 4])
    other = machine.way("other", [99, 1, 4], [99, 1, 2])
    seconds, saved = speed.time_saved(plain, {"other": other}, rounds=2)
    # Wall: 1 of (2 + 6) / 2 and 4 of (6 + 10) / 2, so 3/4 and 1/2 are saved; cpu: 3/4 and 1/2.
    assert seconds == {"wall": 6, "cpu": 4}
    expected = {"other": Saved(median=0.625, low=0.5625, high=0.6875)}
    assert saved == {"wall": expected, "cpu": expected}


def test_ways_take_turns_between_plain_runs_after_all_have_compiled(machine):
    plain = machine.way("plain", [1] * 9, [1] * 9)
    others = {name: machine.way(name, [1] * 9, [1] * 9) for name in "ab"}
    speed.time_saved(plain, others, rounds=3)
    warm, first, later = machine.ran[:3], machine.ran[3:8], machine.ran[8:]
    assert warm == ["plain", "a", "b"]
    assert first == ["plain", "a", "plain", "b", "plain"]
    assert later == ["a", "plain", "b", "plain"] * 2


def test_what_a_machine_is_busy_with_otherwise_cancels(machine):
    # It grows slower, steadily; the other way always takes half.
    plain = machine.way("plain", [9, 10, 30, 50, 70], [1] * 9)
    other = machine.way("other", [9, 10, 20, 30], [1] * 9)
    _, saved = speed.time_saved(plain, {"other": other}, rounds=3)
    assert saved["wall"]["other"] == Saved(median=0.5, low=0.5, high=0.5)
    assert saved["cpu"]["other"].median == 0


def test_a_way_that_takes_longer_saves_less_than_nothing(machine):
    plain = machine.way("plain", [9, 1, 1, 1], [1] * 9)
    _, saved = speed.time_saved(plain, {"x": machine.way("x", [9, 3, 3], [1] * 9)}, rounds=2)
    assert saved["wall"]["x"].median == -2


def test_policies_are_timed_against_the_full_model_in_turn(machine):
    policies = [ExitPolicy.of(t, 3, "cosine") for t in (0.25, 0.75)]

    def under(policy):
        machine.run(policy, 8 * policy.thresholds[0], 1)

    found = speed.of_policies(lambda: machine.run("full", 8, 1), under, policies, rounds=2)
    assert found.saved == tuple(Saved(median=s, low=s, high=s) for s in (0.75, 0.25))
    assert found.seconds == 8
    assert found.machine.endswith("medians and quartiles of 2 interleaved runs")
    assert machine.ran[:3] == ["full", *policies]


def test_a_speed_comes_back_from_a_file():
    found = Speed(
        machine="1 x cpu",
        seconds=0.5,
        saved=(Saved(median=0.5, low=0.25, high=0.75), Saved(median=0.0, low=0.0, high=0.0)),
    )
    assert Speed.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found
