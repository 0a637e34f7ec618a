"""A run that version 0.1.0 began goes on: its directory as that version left it, and what it saved next itself."""

import shutil
import sys
from pathlib import Path

import pytest
from support.runs import finish, start

from anemoi_dist.checkpoint.compare import differences
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.run.events import read_events

OLD = Path(__file__).parent / "run-0.1.0"
STEP_8 = Path(__file__).parent / "run-0.1.0-after" / "step-00000008"
LOSSES = {5: 1.5953680276870728, 6: 1.665393352508545, 7: 1.6040176153182983, 8: 1.701484203338623}
#: On the kind of processor that wrote the files everything is equal, bit for bit; others round sums in another order.
ROUNDING = 1e-6


def test_a_run_of_0_1_0_goes_on(tmp_path: Path) -> None:
    run = tmp_path / OLD.name.replace("run", "version")
    shutil.copytree(OLD, run)
    command = [sys.executable, "-m", "anemoi_dist.launch.cli", "resume", run.name, "--root", str(tmp_path)]
    code, output = finish(start([*command, "training.max_steps=8"]))
    assert code == 0, output
    assert "resumes at step 4" in output
    events = [event for event in read_events(run / "events.jsonl") if event["event"] == "step" and event["step"] > 4]
    assert {event["step"]: event["loss"] for event in events} == pytest.approx(LOSSES, rel=ROUNDING)
    ours, theirs = SavedCheckpoint(run / "checkpoints" / STEP_8.name), SavedCheckpoint(STEP_8)
    assert ours.manifest.samples_seen == theirs.manifest.samples_seen == 32
    for difference in differences(ours, theirs):
        assert difference.what == "values" and difference.max_abs <= ROUNDING, difference
    assert not any(difference.kind == "step" for difference in differences(ours, theirs))
