"""``task=anemoi`` as a user meets it: their configuration, the launcher, a ``kill -9``, and a job's time limit."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from support.anemoi import PROCESSED, SMALL, write_dataset
from support.faults import SlurmRun
from support.minislurm import MiniSlurm
from support.runs import assert_equal_bit_for_bit, finish, ranks_of, start, wait_for_checkpoint, wait_for_step

from anemoi_dist.run.events import read_events


def settings(root: Path) -> list[str]:
    theirs = (
        f"system.input.dataset={root / 'small.zarr'}",
        f"system.output.root={root}",
        *SMALL,
        *PROCESSED,
        "system.hardware.num_gpus_per_node=2",
        "training/optimization/optimizer=ademamix",
        "training.max_steps=24",
        "dataloader.limit_batches.training=8",
        "dataloader.num_workers={training:1,validation:1,test:1}",
        "diagnostics.log.interval=1",
    )
    task = ("task=anemoi", f"task.config={root / 'theirs'}", f"task.overrides={json.dumps(theirs)}")
    return [*task, "run.seed=5", "checkpoint.interval_steps=3"]


def command(root: Path, run_id: str, *more: str) -> list[str]:
    program = [sys.executable, "-m", "anemoi_dist.launch.cli", "train"]
    return [*program, *settings(root), f"run.root={root}", f"run.id={run_id}", *more]


@pytest.mark.slow
def test_a_run_that_is_killed_or_requeued_goes_on_bit_for_bit(cluster: MiniSlurm, tmp_path: Path) -> None:
    write_dataset(tmp_path / "small.zarr")
    (tmp_path / "theirs").mkdir()
    code, output = finish(start(command(tmp_path, "a")))
    assert code == 0, output
    process = start(command(tmp_path, "b", "task.inference=checkpoints"))
    wait_for_step(tmp_path / "b", random.randint(6, 15), process)
    wait_for_checkpoint(tmp_path / "b", process)
    os.kill(ranks_of(process, tmp_path / "b")[1].pid, signal.SIGKILL)
    code, output = finish(process)
    assert code != 0, output
    code, output = finish(start(command(tmp_path, "b", "task.inference=checkpoints")))
    assert code == 0 and "resumes at step" in output, output
    assert_equal_bit_for_bit(tmp_path / "a", tmp_path / "b")
    kept = {f"{folder.name}.ckpt" for folder in (tmp_path / "b" / "checkpoints").iterdir()}
    assert {file.name for file in (tmp_path / "b" / "inference").iterdir()} == kept and len(kept) > 1, output
    scores = {
        e["step"]: e["scores"] for e in read_events(tmp_path / "b" / "events.jsonl") if e["event"] == "validation"
    }
    names = {score["name"] for score in scores[24]}
    assert {"loss", "data_mse_metric/data/msl/1", "data_mse_metric/data/t_850/3"} <= names
    assert set(scores) == {8, 16, 24} and {name for name in names if name.endswith("/3")}

    nodes = ("launcher=slurm", "launcher.profile=minislurm", "launcher.nodes=2", "launcher.ranks=1")
    job = SlurmRun(cluster, tmp_path, "c", *settings(tmp_path), *nodes)
    job.wait_for_step(10)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job.job_id))
    assert job.wait_until_over() == "COMPLETED", job.log
    assert [event["code"] for event in job.launches("end")] == [75, 0]
    assert job.steps_repeated() == 0 and not job.left_running()
    assert_equal_bit_for_bit(tmp_path / "a", job.directory)
