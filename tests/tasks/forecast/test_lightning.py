"""A Lightning Trainer drives the module: the loss falls and the rate follows the cosine, update by update."""

import math
import warnings

import pytest
import torch
from support.quiet_lightning import lightning, quiet_trainer
from torch.utils.data import DataLoader, Dataset

from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.tasks.forecast.lightning import as_lightning
from anemoi_dist.tasks.forecast.module import BaseGraphModule
from tests.models.test_latlon import make_spec
from tests.tasks.forecast.test_module import make_config

MAX_STEPS, RATE, WARMUP = 6, 2e-2, 2


class Waves(Dataset):
    """A wave that travels east by one cell a step, on the grid of ``make_spec``."""

    def __len__(self) -> int:
        return 4 * MAX_STEPS

    def __getitem__(self, index: int) -> Batch:
        longitude = torch.arange(16) * (2 * math.pi / 16)
        phase = torch.arange(3).view(-1, 1) * (2 * math.pi / 16)
        wave = torch.sin(longitude - phase + index).view(3, 1, 1, 16, 1)
        return Batch(wave.expand(3, 1, 9, 16, 3).reshape(3, 1, -1, 3).clone(), torch.tensor(index))


def collate(samples: list[Batch]) -> Batch:
    return Batch(*(torch.stack(column) for column in zip(*samples, strict=True)))


def test_trainer_drives_the_module():
    torch.manual_seed(0)
    spec: DataSpec = make_spec()
    config = make_config(
        model={"_target_": "anemoi_dist.models.latlon.LatLonCNN", "hidden_channels": 8, "dilations": [1]},
        max_steps=MAX_STEPS,
        lr={"rate": RATE, "warmup": WARMUP},
        optimizer={"_target_": "anemoi_dist.optimizers.ademamix.AdEMAMix", "betas": [0.9, 0.999, 0.999]},
    )
    module = BaseGraphModule(config, spec=spec)
    rates, losses = [], []

    class Record(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(outputs["loss"].item())

    trainer = quiet_trainer(max_steps=MAX_STEPS, callbacks=[Record()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(as_lightning(module), DataLoader(Waves(), batch_size=4, collate_fn=collate))

    assert len(losses) == MAX_STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert rates == pytest.approx([expected_rate(step) for step in range(MAX_STEPS)], rel=1e-6)


def expected_rate(step: int) -> float:
    """Linear from rate/(warmup + 1), then half a cosine over all steps."""
    if step < WARMUP:
        start = RATE / (WARMUP + 1)
        return start + step * (RATE - start) / WARMUP
    return RATE * 0.5 * (1 + math.cos(math.pi * step / MAX_STEPS))
