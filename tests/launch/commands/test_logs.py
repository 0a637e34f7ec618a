from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from support.fake_slurm import FakeSlurm, squeue_line
from support.many_runs import attempt, make_run, write_beat, write_launch, write_state
from support.waiting import PATIENCE_S, wait_until

from anemoi_dist.launch.cli import main
from anemoi_dist.launch.commands import logs
from anemoi_dist.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return make_run(tmp_path / "runs", "r")


def write(run: RunDirectory, number: int, rank: int, text: str) -> None:
    file = run.log_file(number, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(text)


def print_logs(run: RunDirectory, *arguments: str) -> int:
    return main(["logs", str(run.path), *arguments])


def test_rank_0_of_the_newest_attempt_is_shown(run, capfdbinary):
    for number in (1, 2, 10):
        for rank in (0, 1):
            write(run, number, rank, f"attempt {number}, rank {rank}: é\n")
    assert print_logs(run) == 0
    assert capfdbinary.readouterr().out.decode() == "attempt 10, rank 0: é\n"
    assert print_logs(run, "--rank", "1", "--attempt", "2") == 0
    assert capfdbinary.readouterr().out.decode() == "attempt 2, rank 1: é\n"


def test_any_bytes_are_printed_as_they_are(run, capfdbinary):
    run.logs_dir(1).mkdir(parents=True)
    run.log_file(1, 0).write_bytes(b"\xff\x00\x1b[1m" * 700_000)
    assert print_logs(run) == 0
    assert capfdbinary.readouterr().out == b"\xff\x00\x1b[1m" * 700_000


def test_a_wrong_rank_or_attempt_says_what_there_is(run, capsys):
    assert print_logs(run) == 2
    assert "no rank of it has started" in capsys.readouterr().err
    for rank in (0, 1, 2, 5):
        write(run, 1, rank, "x")
    write(run, 3, 0, "x")
    assert print_logs(run, "--rank", "7") == 2
    error = capsys.readouterr().err
    assert "has no log of rank 7 in attempt 3" in error
    assert "--attempt 1 has ranks 0-2, 5; --attempt 3 has ranks 0" in error
    assert print_logs(run, "--attempt", "2") == 2
    assert "has no log of rank 0 in attempt 2" in capsys.readouterr().err


def test_before_any_rank_the_batch_script_speaks(run, capfd):
    run.slurm_logs_dir.mkdir(exist_ok=True)
    (run.slurm_logs_dir / "slurm-12.log").write_text("module: no such module\n")
    assert print_logs(run) == 0
    assert capfd.readouterr().out == "module: no such module\n"
    assert print_logs(run, "--rank", "0") == 2
    assert "slurm-12.log is of the batch script" in capfd.readouterr().err


def end(run: RunDirectory, code: int) -> None:
    write_state(run, {"state": "finished", "owner": None, "attempts": [attempt(started=300, code=code)]})
    write_launch(run, {"event": "end", "code": code})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(logs, "_READ_S", 0.02)
    monkeypatch.setattr(logs, "_STATE_S", 0.05)


class Following(threading.Thread):
    """Follows in the background; ``seen`` is what has been printed.

    It prints into a file: pytest's capture loses what a thread prints between its reading and its truncating.
    """

    def __init__(self, run: RunDirectory, monkeypatch, *arguments: str) -> None:
        super().__init__(daemon=True)
        self._run, self._arguments, self._printed = run, arguments, run.path / "printed"
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, self._printed.open("a"))
        self.start()

    def run(self) -> None:
        assert print_logs(self._run, "--follow", *self._arguments) == 0

    @property
    def seen(self) -> str:
        return self._printed.read_text()

    def wait_for(self, text: str) -> None:
        assert wait_until(lambda: text in self.seen), f"{text!r} was not printed, but {self.seen!r}"

    def has_ended(self) -> bool:
        self.join(PATIENCE_S)
        return not self.is_alive()


def test_following_crosses_attempts_and_a_requeue_and_ends_with_the_run(run, quick, tmp_path, monkeypatch):
    slurm = FakeSlurm(tmp_path / "bin", monkeypatch)
    slurm.answer("squeue", squeue_line("12", "RUNNING"))
    write_state(run, {"state": "running", "owner": None, "attempts": [attempt(started=300)]})
    write_launch(run, {"event": "launch", "kind": "slurm", "job_id": "12", "ago": 310})
    write(run, 1, 0, "one\n")
    following = Following(run, monkeypatch)
    following.wait_for("one\n")
    write(run, 1, 0, "two\n")
    following.wait_for("two\n")
    slurm.answer("squeue", squeue_line("12", "PENDING", restarts=1))
    time.sleep(0.3)
    assert following.is_alive(), "a job in the queue is no end"
    write(run, 2, 1, "not this rank\n")
    write(run, 1, 0, "last words\n")
    following.wait_for("last words\n")
    write(run, 2, 0, "three\n")
    following.wait_for("three\n")
    assert following.seen.index("==> attempt-02 <==") > following.seen.index("last words")
    write(run, 2, 0, "four\n")
    end(run, 0)
    slurm.answer("squeue", squeue_line("12", "COMPLETED"))
    following.wait_for("four\n")
    assert following.has_ended() and "not this rank" not in following.seen


def test_following_one_attempt_ends_with_it(run, quick, monkeypatch):
    write(run, 1, 0, "one\n")
    write_state(run, {"state": "running", "owner": {"host": "n1", "pid": 1}, "attempts": [attempt(started=300)]})
    write_beat(run, 0)
    following = Following(run, monkeypatch, "--attempt", "1")
    following.wait_for("one\n")
    write(run, 2, 0, "two\n")
    assert following.has_ended() and "two" not in following.seen


def test_following_a_finished_run_prints_and_ends(run, quick, capfd):
    write(run, 1, 0, "one\n")
    end(run, 0)
    assert print_logs(run, "--follow") == 0
    assert capfd.readouterr().out == "one\n"


def test_following_waits_for_the_first_rank(run, quick, tmp_path, monkeypatch):
    slurm = FakeSlurm(tmp_path / "bin", monkeypatch)
    slurm.answer("squeue", squeue_line("12", "PENDING"))
    write_launch(run, {"event": "submit", "kind": "slurm", "job_id": "12"})
    following = Following(run, monkeypatch)
    following.wait_for("waiting")
    write(run, 1, 0, "one\n")
    following.wait_for("one\n")
    end(run, 0)
    slurm.answer("squeue", squeue_line("12", "COMPLETED"))
    assert following.has_ended()


def test_a_log_that_begins_anew_is_read_from_its_start(tmp_path, capfd):
    file = Path(tmp_path, "log")
    file.write_text("long enough\n")
    offset = logs._print(file, offset=0)
    file.write_text("new\n")
    logs._print(file, offset=offset)
    assert capfd.readouterr().out == "long enough\nnew\n"
