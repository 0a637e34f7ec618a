"""What run.json says of attempts, and that one run has one owner."""

from __future__ import annotations

from pathlib import Path

import pytest

from anemoi_dist import ownership
from anemoi_dist.attempt import Attempt, is_finished, record_end
from anemoi_dist.errors import ExitCode, PreflightError
from anemoi_dist.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (ExitCode.FINISHED, "finished"),
        (ExitCode.SAVED_RUN_AGAIN, "preempted"),
        (ExitCode.DIVERGED, "failed"),
        (ExitCode.INTERNAL, "failed"),
        (ExitCode.INTERRUPTED, "cancelled"),
    ],
)
def test_an_attempt_is_recorded_from_start_to_end(run: RunDirectory, code: ExitCode, state: str) -> None:
    attempt = Attempt(run, world_size=2, max_steps=10)
    assert attempt.number == 1
    running = run.read_state()
    assert running["state"] == "running" and running["owner"]["pid"] > 0
    attempt.end(code)
    ended = run.read_state()
    assert ended["state"] == state and ended["owner"] is None
    assert ended["attempts"][0]["exit_code"] == code and ended["attempts"][0]["world_size"] == 2
    assert is_finished(run, max_steps=10) is (code == ExitCode.FINISHED)
    assert not is_finished(run, max_steps=11)
    assert Attempt(run, world_size=1, max_steps=10).number == 2


def test_ranks_that_stay_are_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.3)
    first = Attempt(run, world_size=1, max_steps=1)
    with pytest.raises(PreflightError, match=r"run r is held by process \d+ on "):
        Attempt(run, world_size=1, max_steps=1)
    assert len(run.read_state()["attempts"]) == 1
    first.end(ExitCode.FINISHED)
    Attempt(run, world_size=1, max_steps=1)


def test_the_first_record_of_an_end_stands(run: RunDirectory) -> None:
    attempt = Attempt(run, world_size=2, max_steps=1)
    failure = {"rank": 1, "host": "h", "pid": 2, "error": "It broke", "log": "l"}
    record_end(run, attempt.number, ExitCode.INTERNAL, failure=failure)
    attempt.end(ExitCode.FINISHED)
    assert run.read_state()["attempts"][0]["failure"] == failure
    assert run.read_state()["attempts"][0]["exit_code"] == ExitCode.INTERNAL
