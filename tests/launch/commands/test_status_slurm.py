"""What is said of a run while a real SLURM queues, runs, requeues and ends its job, and while slurmctld is down."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.many_runs import attempt, make_run, write_beat, write_state
from support.minislurm import MiniSlurm
from support.waiting import wait_until

from anemoi_dist.launch.cli import main
from anemoi_dist.launch.status import journal
from anemoi_dist.launch.status.inspection import inspect_run
from anemoi_dist.launch.status.run_status import RunStatus
from anemoi_dist.launch.status.slurm_queue import GONE, SlurmQueue
from anemoi_dist.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path, cluster: MiniSlurm, monkeypatch) -> RunDirectory:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    yield make_run(tmp_path / "runs", "r")
    cluster.cancel_all()


def submit(cluster: MiniSlurm, run: RunDirectory, *options: str, command: str = "sleep 300") -> str:
    arguments = ["--parsable", "--output=/dev/null", "--time=10", *options, "--wrap", command]
    job_id = cluster.run("sbatch", *arguments).strip()
    journal.note(run, "submit", kind="slurm", job_id=job_id)
    return job_id


def wait_for(run: RunDirectory, state: str, timeout_s: float = 120) -> RunStatus:
    seen: list[RunStatus] = []
    found = wait_until(
        lambda: seen.append(inspect_run(run)) or seen[-1].state == state, timeout_s=timeout_s, every_s=0.2
    )
    assert found, [(status.state, status.detail) for status in seen[-3:]]
    return seen[-1]


def launch(run: RunDirectory, job_id: str, life: int, number: int) -> None:
    """Write what the job's processes would."""
    journal.note(run, "launch", kind="slurm", job_id=job_id, life=life)
    older = [attempt(old + 1, started=600) for old in range(number - 1)]
    write_state(run, {"state": "running", "owner": None, "attempts": [*older, attempt(number, started=0)]})
    for rank in range(2):
        write_beat(run, rank, number=number, ago=0)


def test_a_jobs_whole_life(cluster: MiniSlurm, run: RunDirectory):
    job_id = submit(cluster, run, "--hold", "--nodes=2", "--ntasks-per-node=1")
    assert "scontrol release" in wait_for(run, "submitted").detail
    cluster.run("scontrol", "release", job_id)
    started = wait_for(run, "starting")
    assert started.nodes == "node[1-2]" and 0 < started.limit_s <= 600
    launch(run, job_id, life=0, number=1)
    assert inspect_run(run).state == "running"

    cluster.run("scontrol", "requeue", job_id)
    said = set()

    def is_back() -> bool:
        status = inspect_run(run)
        said.add(status.state)
        return status.state == "starting" and status.restarts == 1

    assert wait_until(is_back, every_s=0.1)
    assert said <= {"requeued", "starting"}, "never running, silent, crashed or lost in the minutes between"
    assert "requeued" in said
    launch(run, job_id, life=1, number=2)
    assert (inspect_run(run).state, inspect_run(run).restarts) == ("running", 1)

    assert main(["cancel", str(run.path)]) == 0
    assert inspect_run(run).state in ("stopping", "cancelled")
    wait_for(run, "cancelled")


def test_scancel_and_failures_are_told_apart(cluster: MiniSlurm, run: RunDirectory):
    job_id = submit(cluster, run)
    wait_for(run, "starting")
    cluster.run("scancel", job_id)
    assert "by scancel" in wait_for(run, "cancelled").detail
    submit(cluster, run, command="exit 3")
    assert "FAILED (NonZeroExitCode) with code 3" in wait_for(run, "failed").detail


def test_a_job_that_slurm_does_not_know(cluster: MiniSlurm, run: RunDirectory):
    journal.note(run, "submit", kind="slurm", job_id="4000000")
    assert SlurmQueue().views(["4000000"])["4000000"].state == GONE
    assert inspect_run(run).state == "lost"


def test_slurmctld_down_is_said(cluster: MiniSlurm, run: RunDirectory, capsys):
    job_id = submit(cluster, run)
    wait_for(run, "starting")
    launch(run, job_id, life=0, number=1)
    # Gently: one that is killed forgets a job that it has not written down yet.
    cluster.run("scontrol", "shutdown", "slurmctld")
    assert wait_until(lambda: inspect_run(run).notes)
    try:
        for command in (["runs", "--root", str(Path(run.path.parent))], ["status", str(run.path)]):
            assert main(command) == 0
            out = capsys.readouterr().out
            assert "slurmctld does not answer" in out and "running" in out
        assert main(["cancel", str(run.path)]) == 3
    finally:
        cluster.start_controller()
    assert wait_until(lambda: not inspect_run(run).notes)
    assert inspect_run(run).state == "running"
