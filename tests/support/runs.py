"""Runs of the product as a user starts them, and what is read from their directories afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.run.events import read_events
from support.waiting import PATIENCE_S, wait_until

NUM_STEPS = 40
#: Synthetic data and few scores: what costs is starting ranks. Steps wait a little, to be hit in the middle.
SMALL = [
    "data=synthetic",
    "data.dataset.field_shape=[6,12]",
    "data.num_workers=1",
    "model._target_=support.hanging.HangingModel",
    "+model.hidden_channels=6",
    "+model.dilations=[1]",
    "security.allowed_targets=[support.hanging]",
    "training.global_batch_size=4",
    f"training.max_steps={NUM_STEPS}",
    "training.lr.warmup=4",
    "checkpoint.interval_steps=5",
    "telemetry.interval_steps=1",
    "validation.interval_steps=30",
    "validation.max_samples=4",
    "validation.lead_steps=[1,2]",
]
#: For ranks, in the environment: where that model is, and for how long a step waits.
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "PAUSE_S": "0.1"}


def command(root: Path, run_id: str, *more: str, small: Sequence[str] = SMALL) -> list[str]:
    program = [sys.executable, "-m", "anemoi_dist.launch.cli", "train"]
    return [*program, *small, f"run.root={root}", f"run.id={run_id}", *more]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], *, starts: int = 1) -> None:
    """Wait for a step of the newest of so many starts."""

    def is_reached() -> bool:
        if not (run / "events.jsonl").exists():
            return False
        events = [e for e in read_events(run / "events.jsonl") if e["event"] in ("start", "step")]
        begun = [index for index, e in enumerate(events) if e["event"] == "start"]
        return len(begun) >= starts and any(e["event"] == "step" and e["step"] >= step for e in events[begun[-1] :])

    wait_until(lambda: is_reached() or process.poll() is not None, every_s=0.01)
    if process.poll() is not None or not is_reached():
        pytest.fail(f"step {step} was not reached: {process.communicate()[0] if process.poll() is not None else ''}")


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    """Saving goes on in the background: wait until something is committed."""
    is_saved = lambda: any((run / "checkpoints").glob("step-????????"))  # noqa: E731
    assert wait_until(lambda: is_saved() or process.poll() is not None, every_s=0.01)
    assert process.poll() is None, "no checkpoint was committed"


def ranks_of(process: subprocess.Popen[str], run: Path) -> list[psutil.Process]:
    """The training processes below the launcher, without their data workers."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "anemoi_dist.train" in child.cmdline() and child.environ().get("RANK", "") != "":
                parent = child.parent()
                if parent is not None and parent.environ().get("RANK", "") == "":
                    found.append(child)
        except psutil.Error:
            continue
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def final_tensors(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Everything in the newest checkpoint."""
    checkpoint = Checkpoint(max((run / "checkpoints").glob("step-????????")))
    tensors = {}
    for (fqn, kind), info in checkpoint.tensors().items():
        out = torch.empty(info.global_shape, dtype=info.dtype).reshape(-1)
        checkpoint.read(fqn, kind, start=0, out=out)
        tensors[fqn, kind] = out
    return tensors


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(run / "events.jsonl") if e["event"] == "step"}


def assert_equal_bit_for_bit(run: Path, other: Path) -> None:
    expected, actual = final_tensors(run), final_tensors(other)
    assert expected.keys() == actual.keys()
    assert {kind for _, kind in expected} >= {"param", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq", "step"}
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert losses(run) == losses(other)
