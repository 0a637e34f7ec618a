from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from support.fake_slurm import FakeSlurm, squeue_line
from support.many_runs import attempt, make_run, write_beat, write_launch, write_state
from support.waiting import PATIENCE_S, wait_until

from anemoi_dist.config.compose import compose
from anemoi_dist.config.parse import to_yaml
from anemoi_dist.errors import PreflightError
from anemoi_dist.launch import cli
from anemoi_dist.launch.cli import main
from anemoi_dist.launch.commands import cancel, submit, train
from anemoi_dist.launch.status import journal
from anemoi_dist.launch.status.files import gather
from anemoi_dist.launch.status.inspection import inspect_run
from anemoi_dist.run.directory import RunDirectory


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


#: Notes its launch as a launcher does; ends on SIGTERM with 75, or not at all.
LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from anemoi_dist.launch.status import journal
from anemoi_dist.run.directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
def end(*_):
    journal.note(run, "end", code=75, reason="SIGTERM")
    os._exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else end)
journal.note(run, "launch", kind="local")
time.sleep(60)
"""


@pytest.fixture
def launched(root):
    """Return ``launched(how)``: a run with a living launcher."""
    processes = []

    def start(how: str) -> tuple[RunDirectory, subprocess.Popen[bytes]]:
        run = make_run(root, "r")
        process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(run.path), how])
        processes.append(process)
        assert wait_until(lambda: journal.read(run) or process.poll() is not None, every_s=0.02)
        assert process.poll() is None
        return run, process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def say(root: Path, name: str, *arguments: str) -> int:
    return main([name, "r", "--root", str(root), *arguments])


# stop


def test_stop_asks_and_says_what_will_happen(root, launched, capsys):
    run, _ = launched("obeys")
    assert say(root, "stop") == 0
    assert run.stop_file.exists()
    assert "ends with code 75" in capsys.readouterr().out


def test_stop_of_what_does_not_run_leaves_no_file(root, capsys):
    run = make_run(root, "r", state={"state": "finished", "attempts": [attempt(started=99, code=0)]})
    assert say(root, "stop") == 2
    assert not run.stop_file.exists(), "it would stop the next start"
    assert "nothing to stop: it is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "rank_1_ago", "says"),
    [("PENDING", 1, "keeps its place in the queue"), ("RUNNING", 300, "may never reach")],
)
def test_stop_of_what_will_not_hear_of_it_says_so(root, slurm, capsys, state, rank_1_ago, says):
    run = make_run(root, "r", state={"state": "running", "attempts": [attempt(started=400)]})
    write_launch(run, {"event": "launch", "kind": "slurm", "job_id": "12", "ago": 410})
    write_beat(run, 0)
    write_beat(run, 1, ago=rank_1_ago)
    slurm.answer("squeue", squeue_line("12", state))
    assert say(root, "stop") == 0
    assert run.stop_file.exists() and says in capsys.readouterr().out


def test_stop_of_a_command_is_refused(root, slurm, capsys):
    run = make_run(root, "r")
    write_launch(run, {"event": "submit", "kind": "slurm", "job_id": "12", "command": ["true"]})
    slurm.answer("squeue", squeue_line("12", "RUNNING"))
    assert say(root, "stop") == 2
    assert not run.stop_file.exists() and "anemoi-dist cancel r" in capsys.readouterr().err


def test_anemoi_training_hears_of_a_stop(root, slurm, capsys):
    run = make_run(root, "r")
    command = ["anemoi-training", "train"]
    write_launch(run, {"event": "submit", "kind": "slurm", "job_id": "12", "command": command})
    slurm.answer("squeue", squeue_line("12", "RUNNING"))
    assert say(root, "stop") == 0
    assert run.stop_file.exists()


# cancel


def test_cancel_ends_a_launcher_that_obeys(root, launched, capsys):
    run, process = launched("obeys")
    assert say(root, "cancel") == 0
    assert process.wait(PATIENCE_S) == 75
    assert "ended by SIGTERM" in capsys.readouterr().out
    assert [event.event for event in journal.read(run)] == ["launch", "cancel", "end"]
    assert inspect_run(run).state == "cancelled"


def test_cancel_kills_a_launcher_that_does_not(root, launched, monkeypatch, capsys):
    monkeypatch.setattr(cancel, "_GRACE_S", 0.3)
    run, process = launched("deaf")
    assert say(root, "cancel") == 0
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert "ended by SIGKILL" in capsys.readouterr().out
    assert inspect_run(run).state == "cancelled"


def test_a_process_that_only_inherited_the_pid_is_left_alone(root, launched):
    run, process = launched("obeys")
    [event] = journal.read(run)
    run.launch_file.unlink()
    write_launch(run, {**asdict(event), "started": event.started - 1})
    assert say(root, "cancel") == 2
    assert inspect_run(run).state == "crashed"
    assert cancel._end(gather(run), process.pid) is None
    time.sleep(0.2)
    assert process.poll() is None


def test_cancel_from_another_host_says_where(root, capsys):
    run = make_run(root, "r", state={"state": "running", "owner": {"host": "n7"}, "attempts": [attempt(started=99)]})
    write_launch(run, {"event": "launch", "kind": "local", "pid": 77, "started": 1, "host": "n7", "ago": 100})
    write_beat(run, 0)
    assert say(root, "cancel") == 3
    assert "was started on n7 by process 77: cancel it there" in capsys.readouterr().err
    run.launch_file.unlink()
    assert say(root, "cancel") == 3
    assert "not started by anemoi-dist on n7" in capsys.readouterr().err
    assert journal.read(run) == []


def test_cancel_of_a_job(root, slurm, capsys):
    run = make_run(root, "r")
    write_launch(run, {"event": "submit", "kind": "slurm", "job_id": "12"})
    slurm.answer("squeue", squeue_line("12", "PENDING", reason="Priority"))
    slurm.answer("scancel")
    assert say(root, "cancel") == 0
    assert slurm.asked()[-1] == ["scancel", "12"]
    assert "it was submitted (job 12 waits: Priority)" in capsys.readouterr().out
    slurm.answer("squeue", squeue_line("12", "CANCELLED"))
    assert inspect_run(run).state == "cancelled"
    assert say(root, "cancel") == 2


def test_cancel_while_slurmctld_is_down_notes_nothing(root, slurm, capsys):
    run = make_run(root, "r")
    write_launch(run, {"event": "submit", "kind": "slurm", "job_id": "12"})
    slurm.answer("squeue", errors="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert say(root, "cancel") == 3
    assert "slurmctld does not answer" in capsys.readouterr().err
    assert [event.event for event in journal.read(run)] == ["submit"]


# resume


@pytest.fixture
def entered(monkeypatch) -> list[list]:
    """Return what resume hands to train or submit: the command, the configuration and whether it is a dry run."""
    calls: list[list] = []
    monkeypatch.setattr(train, "train", lambda config, *, dry_run: calls.append(["train", config, dry_run]) or 0)
    monkeypatch.setattr(
        submit, "submit_all", lambda runs, *, dry_run: calls.append(["submit", runs[0].config, dry_run]) or 0
    )
    return calls


@pytest.fixture
def frozen(root) -> RunDirectory:
    config = compose(["training.optimizer.alpha=4", "run.id=r", "launcher.backoff_s=9", "run.seed=5"]).config
    state = {"state": "preempted", "attempts": [attempt(started=99, code=75)]}
    return make_run(root, "r", config=to_yaml(config), state=state)


def resume(root: Path, *overrides: str) -> int:
    return cli.main(["resume", "r", "--root", str(root), *overrides])


def test_resume_is_train_with_the_frozen_configuration(root, frozen, entered, tmp_path, monkeypatch):
    assert resume(root) == 0
    [[command, config, _]] = entered
    was = compose([], config_file=frozen.config_file).config
    was.run.root = str(root)
    assert command == "train" and config == was
    assert config.training.optimizer["alpha"] == 4


def test_resume_with_other_settings(root, frozen, entered):
    assert resume(root, "training.max_steps=777", "engine=zero1", "launcher=slurm", "launcher.nodes=3") == 0
    [[command, config, _]] = entered
    assert command == "submit"
    assert (config.training.max_steps, config.engine.stage, config.launcher.kind) == (777, 1, "slurm")
    assert (config.launcher.nodes, config.launcher.backoff_s, config.run.seed) == (3, 1.0, 5)
    assert config.training.optimizer["alpha"] == 4


def test_resume_of_a_run_that_was_moved(root, frozen, entered, tmp_path):
    (tmp_path / "other root").mkdir()
    moved = frozen.path.rename(tmp_path / "other root" / "renamed")
    assert cli.main(["resume", str(moved)]) == 0
    [[_, config, _]] = entered
    assert (config.run.id, config.run.root) == ("renamed", str(moved.parent))


def test_resume_refuses(root, frozen, entered, capsys):
    assert resume(root, "run.id=other") == 2
    assert "cannot name another run" in capsys.readouterr().err
    write_launch(
        frozen, {"event": "submit", "kind": "slurm", "job_id": "12", "command": ["true"]}, {"event": "end", "code": 0}
    )
    assert resume(root) == 2
    assert "is a command" in capsys.readouterr().err
    assert entered == []


def test_resume_passes_a_dry_run_on(root, frozen, entered):
    assert resume(root, "--dry-run", "training.max_steps=777") == 0
    [[command, config, flag]] = entered
    assert (command, config.training.max_steps, flag) == ("train", 777, True)


def test_resume_of_a_finished_run_says_how_to_train_on(root, frozen, entered, capsys):
    write_state(frozen, {"state": "finished", "attempts": [attempt(started=99, code=0)]})
    assert resume(root) == 0 and entered == []
    assert "to train on: anemoi-dist resume r training.max_steps=N" in capsys.readouterr().out
    assert resume(root, "training.max_steps=2000") == 0
    assert entered[0][1].training.max_steps == 2000
    entered.clear()
    # Frozen by a start with more steps that did not come to its first.
    more = frozen.config_file.read_text().replace("max_steps: ", "max_steps: 9000 #")
    frozen.config_file.write_text(more)
    assert resume(root) == 0 and len(entered) == 1


def test_resume_of_a_running_run_is_refused(root, launched, entered, capsys):
    launched("obeys")
    assert resume(root) == 3
    assert "it needs no resume" in capsys.readouterr().err
    assert entered == []


def test_cancel_gives_up_on_a_process_that_cannot_end(root, launched, monkeypatch):
    run, process = launched("deaf")
    monkeypatch.setattr(cancel, "_GRACE_S", 0.1)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda handle, number: None)
    with pytest.raises(PreflightError, match="did not end"):
        cancel._end(gather(run), process.pid)
    assert process.poll() is None
