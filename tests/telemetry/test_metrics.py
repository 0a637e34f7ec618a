import errno
import sys

import pytest

from anemoi_dist.errors import PreflightError
from anemoi_dist.process.output import LOSSES
from anemoi_dist.telemetry import metrics as metrics_module
from anemoi_dist.telemetry.metrics import TensorBoardMetrics


def read(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def test_curves_are_written(tmp_path):
    metrics = TensorBoardMetrics(tmp_path, first_step=0)
    metrics.write({"training/loss": 0.5, "training/lr": 0.25}, step=10)
    metrics.write({"training/loss": 0.125}, step=20)
    metrics.close("finished")
    assert read(tmp_path, "training/loss") == [(10, 0.5), (20, 0.125)]
    assert read(tmp_path, "training/lr") == [(10, 0.25)]


def test_a_resumed_run_hides_the_steps_it_repeats(tmp_path):
    first = TensorBoardMetrics(tmp_path, first_step=0)
    for step in (10, 20, 30):
        first.write({"loss": 1.0}, step=step)
    first.close("finished")
    second = TensorBoardMetrics(tmp_path, first_step=20)
    second.write({"loss": 2.0}, step=30)
    second.close("finished")
    assert read(tmp_path, "loss") == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_missing_package_is_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PreflightError, match=r"pip install 'anemoi-dist\[tensorboard\]'") as caught:
        TensorBoardMetrics(tmp_path, first_step=0)
    assert caught.value.exit_code == 3


def test_a_full_disk_costs_points_and_a_new_file_goes_on(tmp_path, monkeypatch):
    now, is_full = [0.0], [False]
    metrics = TensorBoardMetrics(tmp_path, first_step=5, clock=lambda: now[0])
    metrics.write({"loss": 1.0}, step=6)

    def flush(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def probe(**options):
        if is_full[0]:
            flush()
        return (tmp_path / "probe").open("wb")

    monkeypatch.setattr(metrics_module.tempfile, "TemporaryFile", probe)
    monkeypatch.setattr(metrics._writer, "flush", flush)
    is_full[0] = True
    metrics.write({"loss": 2.0}, step=7)
    now[0] = 100.0
    metrics.write({"loss": 3.0, "lr": 0.5}, step=8)  # tried again, in vain
    is_full[0] = False
    metrics.write({"loss": 4.0}, step=9)  # too soon for another try
    assert LOSSES.take() == []
    now[0] = 200.0
    metrics.write({"loss": 5.0}, step=10)
    metrics.close("finished")
    assert LOSSES.take() == [{"what": "TensorBoard's files", "count": 4, "reason": "No space left on device"}]
    steps = [step for step, _ in read(tmp_path, "loss")]
    assert steps[0] == 6 and steps[-1] == 10 and {8, 9}.isdisjoint(steps)
