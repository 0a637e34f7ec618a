"""Real ranks that hang: each run ends with 6, names the right rank, and shows where it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.many_runs import read_state

from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.telemetry.heartbeat import read_heartbeats

TIMEOUT_S = 10.0
#: What may pass beside the timeout until everything is over, on a machine that has other things to do.
SLACK_S = 20.0
JOB = [
    "data=synthetic",
    "data.dataset.field_shape=[6,12]",
    "model._target_=support.hanging.HangingModel",
    "+model.dilations=[1]",
    "+model.hidden_channels=4",
    "security.allowed_targets=[support.hanging]",
    "training.max_steps=8",
    "training.lr.warmup=2",
    "training.global_batch_size=4",
    "validation.max_samples=4",
    "validation.lead_steps=[1]",
    "telemetry.interval_steps=1",
    f"watchdog.timeout_s={TIMEOUT_S}",
]


def train(root: Path, how: str, *more: str) -> tuple[int, str, RunDirectory, list[psutil.Process]]:
    """Train to the end; return the code, what the terminal showed, the run, and the processes that there were."""
    command = [sys.executable, "-m", "anemoi_dist.launch.cli", "train", *JOB, f"run.root={root}", "run.id=r", *more]
    environment = {**os.environ, "HANG": how, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    below: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        try:
            below |= {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
        except psutil.Error:
            break
        time.sleep(0.2)
    output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    return process.returncode, output, RunDirectory(root / "r"), list(below.values())


@pytest.mark.parametrize(
    ("how", "rank", "engine"),
    [
        ("sleep", 1, "ddp"),
        ("lock", 1, "fsdp2"),
        ("stop", 1, "ddp"),
        pytest.param("sleep", 0, "ddp", marks=pytest.mark.slow),
        pytest.param("lock", 0, "ddp", marks=pytest.mark.slow),
        pytest.param("stop", 0, "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_hang_ends_the_run_and_names_the_rank(tmp_path: Path, how: str, rank: int, engine: str) -> None:
    code, output, run, processes = train(tmp_path, f"{how}:{rank}:4", f"engine={engine}", "launcher.ranks=2")
    assert code == 6, output
    events = read_events(run.events_file)
    [hang] = [event for event in events if event["event"] == "hang"]
    assert hang["rank"] == rank and hang["behind"] == [rank], output
    last_step = [event for event in events if event["event"] == "step"][-1]
    assert last_step["step"] == 3
    attempt = read_state(run)["attempts"][-1]
    assert attempt["exit_code"] == 6 and attempt["failure"]["rank"] == rank
    assert attempt["ended"] - last_step["time"] < TIMEOUT_S + SLACK_S
    assert f"hang: rank {rank} on " in output

    log, other = (run.log_file(1, number).read_text() for number in (rank, 1 - rank))
    if how != "stop":  # a stopped process cannot write
        assert "hanging.py" in log and "in hang" in log
    if how == "sleep":
        assert "hanging.py" in hang["where"] and (hang["phase"], hang["step"]) == ("step", 3)
    else:
        assert [each["rank"] for each in hang["unresponsive"]] == [rank] and hang["where"] == ""
    assert "no sign of life for watchdog.timeout_s=10 s" in other and "in train_step" in other
    gone, alive = psutil.wait_procs(processes, timeout=20)
    assert len(gone) >= 3 and not alive


def test_a_lone_rank_that_holds_the_interpreter_lock(tmp_path: Path) -> None:
    code, output, run, _ = train(tmp_path, "lock:0:4", "engine=ddp", "launcher.ranks=1")
    assert code == 6, output
    attempt = read_state(run)["attempts"][-1]
    assert (attempt["exit_code"], attempt["failure"]["rank"]) == (6, 0)
    assert [event["rank"] for event in read_events(run.events_file) if event["event"] == "hang"] == [0]
    assert "in hang" in run.log_file(1, 0).read_text()


def test_a_rank_that_is_slow_and_at_work_ends_nothing(tmp_path: Path) -> None:
    code, output, run, _ = train(tmp_path, "slow:1:4", "engine=ddp", "launcher.ranks=2")
    assert code == 0, output
    assert not [event for event in read_events(run.events_file) if event["event"] == "hang"]
    # Rank 0 waited for longer than the timeout, and said so to its log and to nobody else.
    assert "no sign of life for watchdog.timeout_s=10 s" in run.log_file(1, 0).read_text()
    assert "no sign of life" not in output
    beats = read_heartbeats(run, attempt=1)
    assert {rank: (beat.phase, beat.step) for rank, beat in beats.items()} == {0: ("end", 8), 1: ("end", 8)}
    assert beats[0].total_steps == 8 and beats[0].loss > 0 and beats[1].loss is None


@pytest.mark.slow
def test_without_a_timeout_nothing_watches_and_ranks_still_give_signs_of_life(tmp_path: Path) -> None:
    code, output, run, _ = train(tmp_path, "sleep:9:9", "engine=ddp", "launcher.ranks=1", "watchdog.timeout_s=null")
    assert code == 0, output
    assert read_heartbeats(run, attempt=1)[0].phase == "end"
    assert "watchdog" not in json.dumps(read_state(run))
