"""From an AdamW run of somebody's own loop to a run of ours, by the commands that a user types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anemoi_dist.config.compose import compose
from anemoi_dist.data.anemoi import open_split
from anemoi_dist.launch import cli
from anemoi_dist.launch.commands.checkpoint import DIFFERENT
from anemoi_dist.run.events import read_events
from anemoi_dist.tasks.forecast.module import BaseGraphModule

SWITCH_STEP, NUM_STEPS, WARMUP = 20, 23, 10
SMALL = [
    "model.hidden_channels=6",
    "model.dilations=[1]",
    "training.global_batch_size=4",
    f"training.max_steps={NUM_STEPS}",
    "training.lr.warmup=4",
    "training.optimizer.alpha=5",
    f"training.optimizer.alpha_warmup={WARMUP}",
    f"training.optimizer.beta3_warmup={WARMUP}",
    "telemetry.interval_steps=1",
    "validation.lead_steps=[1]",
    "validation.max_samples=2",
]


@pytest.fixture
def adamw_file(tmp_path: Path) -> Path:
    config = compose(SMALL).config
    module = BaseGraphModule(config, spec=open_split(config.data, "train", rollout=1).spec())
    adamw = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(SWITCH_STEP):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adamw.step()
    torch.save({"model": module.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "adamw.pt")
    return tmp_path / "adamw.pt"


def test_train_goes_on_from_an_import(adamw_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--root", str(tmp_path)]
    assert cli.main(["checkpoint", "import", str(adamw_file), "--run", "switched", *where]) == 0
    setting = f"++training.optimizer.schedule_start={SWITCH_STEP}"
    assert setting in capsys.readouterr().out
    assert cli.main(["checkpoint", "list", "switched", *where]) == 0
    assert f"{SWITCH_STEP} " in capsys.readouterr().out

    command = [sys.executable, "-m", "anemoi_dist.launch.cli", "train", *SMALL, setting]
    command += [f"run.root={tmp_path}", "run.id=switched", "launcher.ranks=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumes at step {SWITCH_STEP}" in done.stdout
    assert "the checkpoint has no exp_avg_slow: they start at zero" in done.stdout + done.stderr
    events = [e for e in read_events(tmp_path / "switched" / "events.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in events] == [21, 22, 23]
    assert [e["alpha"] for e in events] == pytest.approx([5 * done / WARMUP for done in (1, 2, 3)])

    assert cli.main(["checkpoint", "verify", "switched", *where]) == 0
    assert cli.main(["checkpoint", "diff", "switched@20", "switched@23", *where]) == DIFFERENT
    text = capsys.readouterr().out
    assert "exp_avg_slow: " in text and "only in B" in text and "elements differ" in text
    assert cli.main(["checkpoint", "import", str(adamw_file), "--run", "switched", *where]) == 2
    assert "has a checkpoint of step 23" in capsys.readouterr().err


def test_import_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--run", "new", "--root", str(tmp_path)]
    assert cli.main(["checkpoint", "import", str(tmp_path / "none.pt"), *where]) == 2
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt")
    assert cli.main(["checkpoint", "import", str(tmp_path / "w.pt"), *where]) == 2
    assert "--step N" in capsys.readouterr().err
    options = ["--step", "5", "--rename", "w"]
    assert cli.main(["checkpoint", "import", str(tmp_path / "w.pt"), *where, *options]) == 2
    assert "must be OLD=NEW" in capsys.readouterr().err
    assert cli.main(["checkpoint", "import", str(tmp_path / "w.pt"), *where, "--step", "5", "--rename", "w=v"]) == 0
    assert cli.main(["checkpoint", "show", "new", "--root", str(tmp_path), "--tensors"]) == 0
    assert "v  param  (3,)  F32" in capsys.readouterr().out
