"""Rules between anemoi-training's keys and ours."""

import copy

import pytest
import yaml

from anemoi_dist.config.anemoi.facts import Facts
from anemoi_dist.config.anemoi.layouts import newer_layout
from anemoi_dist.config.anemoi.translate import translate
from anemoi_dist.config.parse import schema_keys
from anemoi_dist.config.tree import place
from anemoi_dist.errors import ConfigError

SETTINGS = yaml.safe_load("""
system: {hardware: {num_nodes: 1, num_gpus_per_node: 4, num_gpus_per_model: 1}}
dataloader:
  batch_size: {training: 2, validation: 4}
  limit_batches: {training: null, validation: null}
  num_workers: {training: 8}
  prefetch_factor: 2
training:
  method: {_target_: anemoi.training.train.methods.SingleTraining}
  max_steps: 1000
  max_epochs: null
  accum_grad_batches: 1
  precision: 32-true
  gradient_clip: {val: 32.0, algorithm: value}
  optimization:
    lr: 1.0e-3
    optimizer: {_target_: torch.optim.AdamW, betas: [0.9, 0.95]}
    lr_scheduler: null
    pl_lr_scheduler: {interval: step}
diagnostics:
  log: {interval: 100}
  check_val_every_n_epoch: 1
  checkpoint: {}
""")
FACTS = Facts(100, 20)


def values(facts=FACTS, precision=None, **changes):
    settings = copy.deepcopy(SETTINGS)
    for key, value in changes.items():
        place(settings, key.replace("__", "."), value)
    layer = translate(settings, facts, precision=precision)
    assert all(key in schema_keys() for key in layer.values)
    assert layer.origins.keys() == layer.values.keys()
    return layer.values


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 8 samples a step, 12 whole batches of 100 samples.
        ({}, {"training.global_batch_size": 8, "training.micro_batch_size": 2, "task.steps_per_epoch": 12}),
        ({"training__accum_grad_batches": 5}, {"training.global_batch_size": 40, "task.steps_per_epoch": 2}),
        ({"training__accum_grad_batches": 50}, {"task.steps_per_epoch": 1}),
        ({"system__hardware__num_gpus_per_model": 2}, {"training.global_batch_size": 4, "task.steps_per_epoch": 25}),
        ({"dataloader__limit_batches__training": 5}, {"task.steps_per_epoch": 5}),
        ({"dataloader__limit_batches__training": 500}, {"task.steps_per_epoch": 12}),
        ({"dataloader__limit_batches__training": 0.5}, {"task.steps_per_epoch": 6}),
        (
            {"system__hardware__num_nodes": 2},
            {"training.global_batch_size": 16, "launcher.nodes": 2, "launcher.ranks": 4},
        ),
        # Steps: the smaller limit.
        ({}, {"training.max_steps": 1000}),
        ({"training__max_epochs": 2}, {"training.max_steps": 24}),
        ({"training__max_epochs": 2, "training__max_steps": None}, {"training.max_steps": 24}),
        ({"training__max_epochs": 500}, {"training.max_steps": 1000}),
        # Rate: as multiplied there, whatever the ranks here.
        ({}, {"training.lr.rate": 4e-3, "training.lr.scale_with": "none", "training.lr.warmup": 0}),
        ({"system__hardware__num_gpus_per_model": 2}, {"training.lr.rate": 2e-3}),
        # Precision, clipping.
        ({"training__precision": "bf16-mixed"}, {"training.precision": "bf16"}),
        ({"training__precision": "32"}, {"training.precision": "fp32"}),
        ({"training__precision": 32}, {"training.precision": "fp32"}),
        ({"training__precision": "16-mixed", "precision": "bf16"}, {"training.precision": "bf16"}),
        ({"training__gradient_clip": {"val": 1.0, "algorithm": "norm"}}, {"training.clip_grad_norm": 1.0}),
        ({"training__gradient_clip": {"val": 0.0, "algorithm": "norm"}}, {"training.clip_grad_norm": None}),
        ({"training__gradient_clip": {"val": 1.0, "algorithm": "norm"}}, {"training.clip_grad_value": None}),
        ({}, {"training.clip_grad_value": 32.0}),
        ({"training__gradient_clip": None}, {"training.clip_grad_norm": None}),
        ({}, {"training.clip_grad_norm": None}),
        (
            {
                "training__weight_averaging": {
                    "_target_": "pytorch_lightning.callbacks.EMAWeightAveraging",
                    "decay": 0.9,
                }
            },
            {"training.weight_averaging.decay": 0.9},
        ),
        ({"training__weight_averaging": None}, {"training.weight_averaging.decay": None}),
        # Validation.
        ({}, {"validation.interval_steps": 12, "validation.max_samples": None}),
        ({"diagnostics__check_val_every_n_epoch": 3}, {"validation.interval_steps": 36}),
        ({"dataloader__limit_batches__validation": 1}, {"validation.max_samples": 16}),
        (
            {"dataloader__limit_batches__validation": 0},
            {"validation.interval_steps": None, "validation.max_samples": 1},
        ),
        # Loader and logs.
        ({}, {"data.num_workers": 8, "data.prefetch_factor": 2, "telemetry.interval_steps": 100}),
        (
            {"diagnostics__log__mlflow": {"enabled": True, "tracking_uri": "file:///m", "experiment_name": "e"}},
            {
                "telemetry.mlflow.tracking_uri": "file:///m",
                "telemetry.mlflow.experiment": "e",
                "telemetry.mlflow.run_name": None,
            },
        ),
        ({"diagnostics__log__tensorboard": {"enabled": True}}, {"telemetry.tensorboard": True}),
    ],
)
def test_rules(changes, expected):
    found = values(**changes)
    assert {key: found[key] for key in expected} == expected


def test_mlflow_off_says_nothing():
    found = values(diagnostics__log__mlflow={"enabled": False, "tracking_uri": None})
    assert not any(key.startswith("telemetry.mlflow") for key in found)


def test_an_ensemble_shares_a_sample():
    found = values(
        training__method={"_target_": "anemoi.training.train.methods.EnsembleTraining"},
        system__hardware={"num_nodes": 2, "num_gpus_per_node": 4, "num_gpus_per_model": 1, "num_gpus_per_ensemble": 4},
    )
    assert (found["training.global_batch_size"], found["training.lr.rate"]) == (4, 2e-3)


def test_timms_schedule_starts_where_theirs_does():
    node = {"_target_": "timm.scheduler.CosineLRScheduler", "t_initial": 9, "warmup_t": 3, "t_in_epochs": False}
    found = values(training__optimization__lr_scheduler=node)
    assert found["training.scheduler"] == {**node, "warmup_lr_init": 0.0}
    torchs = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}
    assert values(training__optimization__lr_scheduler=torchs)["training.scheduler"] == torchs
    assert values()["training.scheduler"] is None


def test_torchs_partitioning_wrapper():
    node = {
        "_target_": "torch.distributed.optim.ZeroRedundancyOptimizer",
        "optimizer_class": {"_target_": "torch.optim.AdamW", "_partial_": True},
        "betas": [0.9, 0.95],
    }
    found = values(training__optimization__optimizer=node)
    assert found["training.optimizer"] == {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]}


def test_an_older_layout():
    settings = copy.deepcopy(SETTINGS)
    del settings["training"]["optimization"]
    settings["training"]["lr"] = {"rate": 1e-3, "iterations": 700, "min": 1e-6, "warmup": 10}
    settings["training"]["optimizer"] = {"zero": True, "kwargs": {"betas": [0.9, 0.95]}}
    settings["training"] = newer_layout(settings["training"])
    assert newer_layout(settings["training"]) is settings["training"]
    found = translate(settings, FACTS).values
    assert (found["training.lr.rate"], found["training.lr.min"]) == (4e-3, 0.0)
    assert found["training.optimizer"] == {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]}
    schedule = {
        name: found["training.scheduler"][name] for name in ("t_initial", "lr_min", "warmup_t", "warmup_lr_init")
    }
    assert schedule == {"t_initial": 700, "lr_min": 1e-6, "warmup_t": 10, "warmup_lr_init": 0.0}


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"every_n_minutes": (30, 3), "every_n_epochs": (1, -1), "every_n_train_steps": (None, 0)}, (12, 30, 3, 12)),
        ({"every_n_train_steps": (100, 5)}, (100, None, 5, None)),
        ({"every_n_train_steps": (6, 5), "every_n_epochs": (2, -1)}, (6, None, 5, 24)),
        ({"every_n_minutes": (30, 0)}, (None, None, 3, None)),
        ({}, (None, None, 3, None)),
    ],
)
def test_checkpoints(checkpoint, expected):
    nodes = {name: {"save_frequency": every, "num_models_saved": n} for name, (every, n) in checkpoint.items()}
    found = values(diagnostics__checkpoint=nodes)
    names = ("interval_steps", "interval_minutes", "keep_last", "keep_every")
    assert tuple(found[f"checkpoint.{name}"] for name in names) == expected


def test_no_checkpoints():
    found = values(diagnostics__enable_checkpointing=False)
    assert (found["checkpoint.interval_steps"], found["checkpoint.interval_minutes"]) == (None, None)


def test_seed(monkeypatch):
    monkeypatch.delenv("ANEMOI_BASE_SEED", raising=False)
    assert values()["run.seed"] == 42
    monkeypatch.setenv("ANEMOI_BASE_SEED", "1234")
    assert values()["run.seed"] == 1234
    monkeypatch.setenv("ANEMOI_BASE_SEED", "x")
    with pytest.raises(ConfigError, match=r"run\.seed"):
        values()


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"training__precision": "16-mixed"}, "training.precision", "training.precision=bf16"),
        ({"training__precision": "64"}, "training.precision", "training.precision=fp32"),
        ({"training__max_steps": None}, "training.max_steps", "must end"),
        ({"training__gradient_clip__algorithm": "agc"}, "training.gradient_clip.algorithm", "norm, value"),
        ({"system__hardware__num_gpus_per_model": 3}, "system.hardware.num_gpus_per_model", "divide the 4 ranks"),
        ({"dataloader__batch_size__training": 0}, "dataloader.batch_size.training", "1 or more"),
        ({"dataloader__batch_size__training": "2"}, "dataloader.batch_size.training", "whole number"),
        ({"dataloader__batch_size__training": 30}, "dataloader.limit_batches.training", "100 samples"),
        ({"dataloader__limit_batches__training": 0}, "dataloader.limit_batches.training", "no batch"),
        ({"training__optimization__lr": "high"}, "training.optimization.lr", "number"),
        ({"training__optimization__optimizer": "adam"}, "training.optimization.optimizer", "_target_"),
        (
            {
                "training__optimization__lr_scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR"},
                "training__optimization__pl_lr_scheduler": {"interval": "epoch"},
            },
            "training.optimization.pl_lr_scheduler.interval",
            "interval=step",
        ),
        (
            {"training__optimization__lr_scheduler": {"_target_": "timm.scheduler.CosineLRScheduler", "t_initial": 3}},
            "training.optimization.lr_scheduler.t_in_epochs",
            "t_in_epochs=false",
        ),
        (
            {"training__weight_averaging": {"_target_": "pytorch_lightning.callbacks.StochasticWeightAveraging"}},
            "training.weight_averaging",
            "EMAWeightAveraging",
        ),
        (
            {
                "training__weight_averaging": {
                    "_target_": "pytorch_lightning.callbacks.EMAWeightAveraging",
                    "update_starting_at_step": 100,
                }
            },
            "training.weight_averaging.update_starting_at_step",
            "not done here",
        ),
    ],
)
def test_what_has_no_counterpart(changes, key, part):
    with pytest.raises(ConfigError) as caught:
        values(**changes)
    assert caught.value.key == key
    assert part in str(caught.value)
