import pytest

from anemoi_dist.telemetry.phases import PHASES, PhaseTimer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_add_up():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for _ in range(3):
        with timer.phase("data"):
            clock.now += 1
        with timer.phase("step"):
            clock.now += 10
        clock.now += 100  # in no phase
    assert timer.seconds() == {"startup": 0, "data": 3, "step": 30, "validation": 0, "checkpoint": 0}
    assert tuple(timer.seconds()) == PHASES


def test_an_inner_phase_stops_the_outer():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("startup"):
        clock.now += 1
        with timer.phase("checkpoint"):
            clock.now += 5
        clock.now += 2
    seconds = timer.seconds()
    assert (seconds["startup"], seconds["checkpoint"]) == (3, 5)


def test_a_running_phase_counts_and_a_failed_one_ends():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer.phase("step"):
        clock.now += 4
        assert timer.seconds()["step"] == 4
        raise RuntimeError
    clock.now += 7
    assert timer.seconds()["step"] == 4


def test_an_unknown_phase_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"'steps' is not one of startup, data, step"), PhaseTimer().phase("steps"):
        pass
