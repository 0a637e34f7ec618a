"""What run.json says of attempts, and that one run has one owner."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
from support.many_runs import read_state

from anemoi_dist.config.identity import Change
from anemoi_dist.errors import ExitCode, PreflightError
from anemoi_dist.run import lock
from anemoi_dist.run.attempt import (
    ENDING,
    Attempt,
    is_finished,
    leave_ending,
    record_end,
    record_killed,
    record_left_ending,
)
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.records import Failure


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
    running = read_state(run)
    assert running["state"] == "running" and running["owner"]["pid"] > 0
    attempt.end(code)
    ended = read_state(run)
    assert ended["state"] == state and ended["owner"] is None
    assert ended["attempts"][0]["exit_code"] == code and ended["attempts"][0]["world_size"] == 2
    assert is_finished(run, max_steps=10) is (code == ExitCode.FINISHED)
    assert not is_finished(run, max_steps=11)
    assert Attempt(run, world_size=1, max_steps=10).number == 2


def test_changes_belong_to_the_attempt_after_them(run: RunDirectory) -> None:
    Attempt(run, world_size=1, max_steps=1).end(ExitCode.INTERNAL)
    changes = [Change("training.lr.rate", was=1, now=2)]
    with run.changing_state() as state:
        state.changes = changes
    second = Attempt(run, world_size=1, max_steps=1)
    second.end(ExitCode.INTERNAL)
    third = Attempt(run, world_size=1, max_steps=1)
    assert (second.changes, third.changes) == (changes, [])
    recorded = [{"key": "training.lr.rate", "was": 1, "is": 2}]
    assert [attempt["changes"] for attempt in read_state(run)["attempts"]] == [[], recorded, []]


def test_ranks_that_stay_are_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    first = Attempt(run, world_size=1, max_steps=1)
    with pytest.raises(PreflightError, match=r"run r is held by process \d+ on "):
        Attempt(run, world_size=1, max_steps=1)
    assert len(read_state(run)["attempts"]) == 1
    first.end(ExitCode.FINISHED)
    Attempt(run, world_size=1, max_steps=1)


def test_the_first_record_of_an_end_stands(run: RunDirectory) -> None:
    attempt = Attempt(run, world_size=2, max_steps=1)
    failure = {"rank": 1, "host": "h", "pid": 2, "error": "It broke", "log": "l"}
    record_end(run, attempt.number, ExitCode.INTERNAL, failure=Failure(**failure))
    attempt.end(ExitCode.FINISHED)
    assert read_state(run)["attempts"][0]["failure"] == failure
    assert read_state(run)["attempts"][0]["exit_code"] == ExitCode.INTERNAL


@pytest.mark.parametrize(("error", "named"), [("betas: no", 0), ("betas: no, I say", 3)])
def test_an_error_that_all_ranks_have_is_rank_0s(run: RunDirectory, error: str, named: int) -> None:
    attempt = Attempt(run, world_size=4, max_steps=1)
    for rank, text in ((3, "betas: no"), (0, error), (2, "betas: no")):
        failure = Failure(rank, host="h", pid=2, error=text, log="l")
        assert record_end(run, attempt.number, ExitCode.CONFIGURATION, failure=failure) == ExitCode.CONFIGURATION
        if rank == 0:
            assert read_state(run)["attempts"][0]["failure"]["rank"] == named
    assert read_state(run)["attempts"][0]["exit_code"] == ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    ("recorded", "error", "blamed"),
    [
        (None, "", 1),
        (ExitCode.INTERNAL, "RuntimeError: [gloo] Connection closed by peer", 1),
        (ExitCode.INTERNAL, "ValueError: no such variable", 0),  # its own: rank 1 may have gone because of it
        (ExitCode.DIVERGED, "the peer is NaN", 0),
    ],
)
def test_a_killed_rank_is_blamed_and_not_those_that_lost_it(
    run: RunDirectory, recorded: ExitCode | None, error: str, blamed: int
) -> None:
    attempt = Attempt(run, world_size=2, max_steps=1)
    if recorded is not None:
        attempt.end(recorded, failure=Failure(0, host="h", pid=2, error=error, log="l"))
    record_killed(run, rank=1, pid=7, number=signal.SIGKILL, attempts_before=0)
    state = read_state(run)
    last = state["attempts"][0]
    assert last["failure"]["rank"] == blamed
    assert last["exit_code"] == (recorded or ExitCode.INTERNAL) and state["state"] == "failed" and not state["owner"]
    if blamed == 1:
        assert last["failure"]["error"].startswith("killed by SIGKILL") and last["failure"]["pid"] == 7


def test_a_rank_killed_before_its_attempt_began_is_not_the_end_of_the_attempt_before(run: RunDirectory) -> None:
    Attempt(run, world_size=2, max_steps=1).end(ExitCode.FINISHED)
    before = read_state(run)
    record_killed(run, rank=1, pid=7, number=signal.SIGKILL, attempts_before=1)
    assert read_state(run) == before


def test_an_end_that_cannot_be_recorded_is_left_for_the_launcher(run, tmp_path, monkeypatch) -> None:
    attempt = Attempt(run, world_size=1, max_steps=10)
    note, failure = tmp_path / "note", Failure(0, host="here", pid=7, error="step 10, the last, was not saved")
    assert not record_left_ending(run, note)

    def fail(*args, **fields):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(RunDirectory, "write_state", fail)
        with pytest.raises(OSError, match="No space left"):
            attempt.end(ExitCode.NO_CHECKPOINT, failure=failure)
        full.setenv(ENDING, str(note))
        leave_ending(attempt.number, ExitCode.NO_CHECKPOINT, failure=failure)
        with pytest.raises(OSError, match="No space left"):
            record_left_ending(run, note)
    assert read_state(run)["state"] == "running"
    assert record_left_ending(run, note)
    (recorded,) = run.read_state().attempts
    assert (recorded.exit_code, recorded.state, recorded.failure_line) == (
        4, "failed", "rank 0 on here (pid 7): step 10, the last, was not saved",
    )  # fmt: skip
    assert run.read_state().state == "failed"
