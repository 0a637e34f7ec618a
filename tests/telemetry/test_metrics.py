import sys

import pytest

from anemoi_dist.errors import PreflightError
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
