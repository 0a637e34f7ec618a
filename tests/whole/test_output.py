"""What is told about training never ends it: readers that leave, streams that are closed, a disk that fills up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import ENVIRONMENT, NUM_STEPS, command, finish, start, wait_for_step
from support.waiting import PATIENCE_S

from anemoi_dist.run.events import read_events

SHORT = ("training.max_steps=12", "launcher.ranks=1")


def state_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def losses_of(run: Path) -> set[str]:
    return {loss["what"] for e in read_events(run / "events.jsonl") if e["event"] == "lost" for loss in e["output"]}


@pytest.mark.slow
def test_a_reader_that_leaves_ends_nothing(tmp_path: Path) -> None:
    process = start(command(tmp_path, "r", *SHORT))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] and not process.stdout.close()
    assert process.wait(PATIENCE_S) == 0
    assert state_of(tmp_path / "r")["state"] == "finished" and "standard output" in losses_of(tmp_path / "r")


@pytest.mark.slow
def test_closed_streams_end_nothing(tmp_path: Path) -> None:
    closed = ["bash", "-c", 'exec 0<&- 1>&- 2>&-; exec "$@"', "_", *command(tmp_path, "r", *SHORT)]
    assert subprocess.run(closed, env={**os.environ, **ENVIRONMENT}, check=False).returncode == 0
    assert state_of(tmp_path / "r")["state"] == "finished"
    assert "finished; for figures" in (tmp_path / "r" / "logs" / "attempt-01" / "rank-00000.log").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("no right to mount a disk of 6 MiB")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while stream.write(b"x" * 4096):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk took everything")


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_ends_nothing(small_disk: Path) -> None:
    run = small_disk / "r"
    options = ("checkpoint.on_error=warn", "checkpoint.keep_last=2", "telemetry.tensorboard=true")
    process = start(command(small_disk, "r", "launcher.ranks=2", *options))
    wait_for_step(run, 7, process)
    ballast = fill(small_disk)
    assert process.stdout is not None
    told = ""
    # Rank 0 goes on to print while the disk takes neither a checkpoint nor, some steps later, an event.
    while not ("was not saved" in told and "events.jsonl cannot be written" in told):
        line = process.stdout.readline()
        assert line, told
        told += line
    ballast.unlink()
    code, output = finish(process)
    assert code == 0, told + output
    assert state_of(run)["state"] == "finished" and (run / "checkpoints" / f"step-{NUM_STEPS:08d}").is_dir()
    steps = [event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]
    assert losses_of(run) and steps == sorted(steps) and steps[-1] == NUM_STEPS
