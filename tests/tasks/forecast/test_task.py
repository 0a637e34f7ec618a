"""The forecast as a task: its splits, its module, its scores and its maps."""

import numpy as np
import torch

from anemoi_dist.config.compose import compose
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.base import Evaluation
from anemoi_dist.tasks.forecast.task import ForecastTask

SYNTHETIC = [
    "data=synthetic",
    "data.dataset.field_shape=[6,8]",
    "data.dataset.num_dates=120",
    "data.train.end=2000-01-15",
    "data.validation.start=2000-01-16",
    "data.validation.end=2000-01-22",
    "data.test.start=2000-01-23",
    "model.dilations=[1]",
    "model.hidden_channels=4",
    "training.rollout=2",
]


def test_splits_that_share_dates_are_named():
    def warnings(*overrides: str) -> list[str]:
        return create_task(compose(list(overrides)).config).warnings()

    assert warnings() == []
    (message,) = warnings("data.train.end=2025-12-23")
    assert "8 of the 16 dates of the validation split are in the training split" in message


class Alone:
    rank, world_size, is_main, device, control_group = 0, 1, True, torch.device("cpu"), None


def test_loss_scores_and_maps_of_a_module(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, group=None: None)
    task = create_task(compose(SYNTHETIC).config)
    assert isinstance(task, ForecastTask)
    module = task.create_module()
    batch = task.collate([task.samples("train")[index] for index in (0, 3)])
    loss = module(batch)
    assert loss.shape == () and loss.requires_grad
    assert torch.equal(loss, module.loss(module.forecast(batch, rollout=2), batch)), "the configured rollout"
    assert module(batch, rollout=1).shape == (2, 1, 1, 48, len(module.spec.prognostic))

    run = RunDirectory(tmp_path / "run")
    run.create()
    with torch.no_grad():
        evaluation = task.evaluate("validation", evaluate=module, world=Alone())
        task.export(run, evaluate=module, world=Alone())
    assert isinstance(evaluation, Evaluation)
    # Before training the model is persistence.
    assert evaluation.summary["rmse"] == 1.0
    assert "persistence" in evaluation.table
    name, hours = module.spec.prognostic[0], module.spec.frequency_s // 3600
    assert evaluation.metrics[f"rmse/{name}/model/{hours}h"] == evaluation.metrics[f"rmse/{name}/persistence/{hours}h"]
    with np.load(run.report_dir / "forecast.npz") as maps:
        assert np.array_equal(maps["forecast"], maps["persistence"])
