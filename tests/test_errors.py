from __future__ import annotations

import pickle

import pytest

from anemoi_dist import errors
from anemoi_dist.errors import AnemoiDistError, ConfigError, DivergedError, ExitCode, StopRequestedError


def test_exit_codes_are_what_scripts_rely_on():
    assert {code.name: int(code) for code in ExitCode} == {
        "FINISHED": 0,
        "CONFIGURATION": 2,
        "PREFLIGHT": 3,
        "NO_CHECKPOINT": 4,
        "DIVERGED": 5,
        "HANG": 6,
        "INTERNAL": 70,
        "SAVED_RUN_AGAIN": 75,
        "INTERRUPTED": 130,
    }


def test_every_error_has_a_code_other_than_finished():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AnemoiDistError)]
    assert len(kinds) > 4
    assert all(kind.exit_code in set(ExitCode) - {ExitCode.FINISHED} for kind in kinds)


def test_config_error_says_value_rule_names_and_fix():
    error = ConfigError("engine", "zero9", "is not an option", fix="engine=zero2", valid=["zero1", "zero2"])
    assert str(error).splitlines() == [
        "engine='zero9': is not an option",
        "  nearest: zero2, zero1",
        "  valid: zero1, zero2",
        "  fix: engine=zero2",
    ]
    assert isinstance(error, ValueError)


def test_a_bare_config_error_is_one_line():
    assert str(ConfigError("a", 1, "is wrong")) == "a=1: is wrong"


def test_only_who_must_start_a_run_again_is_told_to():
    assert str(StopRequestedError(40, "time limit of SLURM job 7")) == "saved step 40: time limit of SLURM job 7"
    told = str(StopRequestedError(40, "SIGTERM"))
    assert told == "stopped by SIGTERM after saving step 40; run the same command again to continue"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a.b", [1], "is wrong", fix="a.b=2", valid=("x", "y")),
        DivergedError(11, 40),
        StopRequestedError(40, "SIGTERM"),
    ],
)
def test_errors_survive_the_way_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
