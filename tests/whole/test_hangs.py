"""Real ranks that hang: each run ends with 6, names the right rank, and shows where it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from support.forked import run_ranks
from support.many_runs import read_state

from anemoi_dist.config.compose import compose
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.run.prepare import prepare_run
from anemoi_dist.telemetry.heartbeat import read_heartbeats

JOB = [
    "data=synthetic",
    "data.dataset.field_shape=[6,12]",
    "data.num_workers=0",
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
    "run.id=r",
]
#: Ranks that a launcher starts import while they are watched; forked ones have done so before.
LAUNCHED_S, FORKED_S = 10, 5


def launch(root: Path, how: str, *more: str) -> tuple[int, str, RunDirectory, list[psutil.Process]]:
    """Train to the end; return the code, what the terminal showed, the run, and the processes that there were."""
    overrides = [*JOB, f"run.root={root}", f"watchdog.timeout_s={LAUNCHED_S}", *more]
    command = [sys.executable, "-m", "anemoi_dist.launch.cli", "train", *overrides]
    environment = {**os.environ, "HANG": how, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    below: dict[int, psutil.Process] = {}
    has_ended = threading.Event()

    def look() -> None:
        while not has_ended.wait(0.5):
            try:
                below.update((child.pid, child) for child in psutil.Process(process.pid).children(recursive=True))
            except psutil.Error:
                return

    looker = threading.Thread(target=look)
    looker.start()
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        has_ended.set()
        looker.join()
    return process.returncode, output, RunDirectory(root / "r"), list(below.values())


def fork(root: Path, how: str, *more: str, num_ranks: int = 2) -> tuple[list[int], str, RunDirectory]:
    """Train to the end without a launcher; return the codes of the ranks, what they printed, and the run."""
    run = prepare_run(compose([*JOB, f"run.root={root}", f"watchdog.timeout_s={FORKED_S}", *more]).config)
    arguments = ["--run-directory", str(run.path)]
    ended = run_ranks("anemoi_dist.train", arguments, num_ranks=num_ranks, output=root / "printed", HANG=how)
    assert not ended.left, "a rank does not end by itself"
    return ended.codes, ended.output, run


def check_hang(run: RunDirectory, printed: str, *, how: str, rank: int, timeout_s: int) -> None:
    events = read_events(run.events_file)
    [hang] = [event for event in events if event["event"] == "hang"]
    assert hang["rank"] == rank and hang["behind"] == [rank], printed
    assert [event for event in events if event["event"] == "step"][-1]["step"] == 3
    attempt = read_state(run)["attempts"][-1]
    assert attempt["exit_code"] == 6 and attempt["failure"]["rank"] == rank
    # Rank 1 has no terminal: where rank 0 hangs, the launcher shows what was recorded.
    assert rank == 0 or f"hang: rank {rank} on " in printed
    log, other = (run.log_file(1, number).read_text() for number in (rank, 1 - rank))
    if how != "stop":  # a stopped process cannot write
        assert "hanging.py" in log and "in hang" in log
    if how == "sleep":
        assert "hanging.py" in hang["where"] and (hang["phase"], hang["step"]) == ("step", 3)
    else:
        assert [each["rank"] for each in hang["unresponsive"]] == [rank] and hang["where"] == ""
    assert f"no sign of life for watchdog.timeout_s={timeout_s} s" in other and "in train_step" in other


@pytest.mark.parametrize(
    ("how", "rank", "engine"),
    [("sleep", 1, "ddp"), ("lock", 1, "fsdp2"), pytest.param("lock", 0, "ddp", marks=pytest.mark.slow)],
)
def test_a_hang_ends_the_run_and_names_the_rank(tmp_path: Path, how: str, rank: int, engine: str) -> None:
    codes, printed, run = fork(tmp_path, f"{how}:{rank}:4", f"engine={engine}")
    assert codes[1 - rank] == 6 and codes[rank] == (6 if how == "sleep" else -9), printed
    check_hang(run, printed, how=how, rank=rank, timeout_s=FORKED_S)


def test_a_stopped_rank_ends_the_launcher_and_all_that_it_started(tmp_path: Path) -> None:
    code, printed, run, processes = launch(tmp_path, "stop:1:4", "engine=ddp", "launcher.ranks=2")
    assert code == 6, printed
    check_hang(run, printed, how="stop", rank=1, timeout_s=LAUNCHED_S)
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert len(gone) >= 3 and not alive


def test_a_lone_rank_that_holds_the_interpreter_lock(tmp_path: Path) -> None:
    code, output, run, _ = launch(tmp_path, "lock:0:4", "engine=ddp", "launcher.ranks=1")
    assert code == 6, output
    attempt = read_state(run)["attempts"][-1]
    assert (attempt["exit_code"], attempt["failure"]["rank"]) == (6, 0)
    assert [event["rank"] for event in read_events(run.events_file) if event["event"] == "hang"] == [0]
    assert "in hang" in run.log_file(1, 0).read_text()


def test_a_rank_that_is_slow_and_at_work_ends_nothing(tmp_path: Path) -> None:
    codes, printed, run = fork(tmp_path, "slow:1:4", "engine=ddp")
    assert codes == [0, 0], printed
    assert not [event for event in read_events(run.events_file) if event["event"] == "hang"]
    # Rank 0 waited for longer than the timeout, and said so to its log and to nobody else.
    assert f"no sign of life for watchdog.timeout_s={FORKED_S} s" in run.log_file(1, 0).read_text()
    assert "no sign of life" not in printed
    beats = read_heartbeats(run, attempt=1)
    assert {rank: (beat.phase, beat.step) for rank, beat in beats.items()} == {0: ("end", 8), 1: ("end", 8)}
    assert beats[0].total_steps == 8 and beats[0].loss > 0 and beats[1].loss is None


def test_without_a_timeout_nothing_watches_and_ranks_still_give_signs_of_life(tmp_path: Path) -> None:
    codes, printed, run = fork(tmp_path, "sleep:9:9", "engine=ddp", "watchdog.timeout_s=null", num_ranks=1)
    assert codes == [0], printed
    assert read_heartbeats(run, attempt=1)[0].phase == "end"
    assert "watchdog" not in json.dumps(read_state(run))
