import copy

import pytest
import torch
import yaml

from anemoi_dist.config.anemoi.layouts import translate_training
from anemoi_dist.config.schema import LrConfig
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import AdEMAMix, create_optimizer
from anemoi_dist.optimizers.learning_rate import create_scheduler

SEED = """
optimizer:
  _target_: anemoi.training.optimizers.AdEMAMix.AdEMAMix
  betas: [0.9, 0.999, 0.9999]
  alpha: 2.0
lr: {rate: 0.625e-4, iterations: 300000, min: 3e-7, warmup: 1000}
"""
OLDER = """
max_steps: 100
optimizer: {zero: true, kwargs: {betas: [0.9, 0.95], weight_decay: 0.1}}
lr: {rate: 0.625e-4, iterations: 300000, min: 3e-7}
"""
NEWER = """
max_steps: 150000
optimization:
  lr: 0.625e-4
  optimizer:
    _target_: anemoi.training.optimizers.AdEMAMix.AdEMAMix
    betas: [0.9, 0.95, 0.9999]
    alpha: 8.0
  lr_scheduler:
    _target_: timm.scheduler.CosineLRScheduler
    lr_min: 3.0e-7
    t_initial: 150000
    warmup_t: 1000
    t_in_epochs: false
  pl_lr_scheduler:
    interval: step
"""


def translate(text, **more):
    node = yaml.safe_load(text) | more
    before = copy.deepcopy(node)
    result = translate_training(node)
    assert node == before
    return result


def test_seed_layout_is_unchanged():
    assert translate(SEED) == (yaml.safe_load(SEED), [])


def test_older_layout():
    training, messages = translate(OLDER)
    assert training == {
        "max_steps": 100,
        "optimizer": {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1},
        "lr": {"rate": 0.625e-4, "iterations": 300000, "min": "3e-7"},
    }
    assert any("engine=zero1" in m for m in messages)
    assert any("kwargs became" in m for m in messages)
    assert isinstance(create_optimizer(training["optimizer"], [torch.ones(1)], lr=0.1), torch.optim.AdamW)
    _, quiet = translate(OLDER, optimizer={"zero": False, "kwargs": None})
    assert not any("engine" in m for m in quiet)


def test_newer_layout_builds():
    training, messages = translate(NEWER)
    assert training.keys() == {"max_steps", "lr", "optimizer", "scheduler"}
    assert training["lr"] == {"rate": 0.625e-4, "scale_with": "world_size"}
    assert messages[0] == "training.optimization.lr became training.lr.rate"
    for name in (
        "optimizer became training.optimizer",
        "lr_scheduler became training.scheduler",
        "pl_lr_scheduler was",
    ):
        assert any(f"training.optimization.{name}" in m for m in messages)
    assert any("scale_with" in m for m in messages)
    lr = LrConfig(**training["lr"])
    optimizer = create_optimizer(training["optimizer"], [torch.ones(1)], lr=lr.rate)
    scheduler = create_scheduler(training["scheduler"], optimizer, lr=lr, max_steps=training["max_steps"])
    assert isinstance(optimizer, AdEMAMix)
    assert (scheduler.lr_min, scheduler.t_initial, scheduler.warmup_t) == (3e-7, 150000, 1000)


def test_newer_layout_with_a_rate_block_and_a_chosen_scaling():
    training, messages = translate(
        "optimization: {lr: {rate: 0.1, warmup: 5}, lr_scheduler: null}", lr={"min": 0.01, "scale_with": "none"}
    )
    assert training == {"lr": {"rate": 0.1, "warmup": 5, "min": 0.01, "scale_with": "none"}, "scheduler": None}
    assert "training.optimization.lr.rate became training.lr.rate" in messages
    assert any("constant" in m for m in messages)


@pytest.mark.parametrize("inner", ["torch.optim.AdamW", {"_target_": "torch.optim.AdamW", "_partial_": True}])
def test_torchs_partitioning_wrapper_is_unwrapped(inner):
    wrapper = {"_target_": "torch.distributed.optim.ZeroRedundancyOptimizer", "optimizer_class": inner}
    for node in (
        {"optimizer": {**wrapper, "betas": [0.9, 0.95]}},
        {"optimization": {"optimizer": {**wrapper, "betas": [0.9, 0.95]}}},
    ):
        training, messages = translate_training(node)
        assert training["optimizer"] == {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]}
        assert any("engine=zero1" in m for m in messages)
    with pytest.raises(ConfigError, match="optimizer_class"):
        translate_training({"optimizer": {"_target_": wrapper["_target_"]}})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"optimization": {"lr": 0.1, "swa": {}}}, "swa"),
        ({"optimization": {"lr": {"rate": 0.1, "gamma": 1}}}, "gamma"),
        ({"optimization": 3}, "group of entries"),
        ({"optimization": {"pl_lr_scheduler": {"interval": "epoch"}}}, "interval=step"),
        ({"optimization": {"pl_lr_scheduler": None}}, "interval=step"),
        ({"optimization": {"pl_lr_scheduler": {"interval": "step", "frequency": 5}}}, "frequency=1"),
        ({"optimization": {"pl_lr_scheduler": {"interval": "step", "monitor": "loss"}}}, "monitor"),
        ({"optimizer": {"zero": True, "kwargs": {}, "name": "adam"}}, "name"),
    ],
)
def test_leftovers_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        translate_training(node)


def test_lightning_options_matter_only_with_a_scheduler():
    training, _ = translate("optimization: {lr: 0.1, lr_scheduler: null, pl_lr_scheduler: null}")
    assert training["scheduler"] is None
