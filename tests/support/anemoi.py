"""Configurations of anemoi-training on a small dataset, and the same training by anemoi-training's own Trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from anemoi_dist.config.anemoi import facts
from anemoi_dist.config.anemoi.facts import Facts
from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.compose import compose
from anemoi_dist.config.schema import Config
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler
from anemoi_dist.distributed.world import World, seed_step
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.anemoi.environment import import_anemoi_training
from anemoi_dist.tasks.anemoi.task import AnemoiTask
from anemoi_dist.tasks.base import Batch, Samples, Task

GIVEN = (
    *("cos_latitude", "sin_latitude", "cos_longitude", "sin_longitude", "cos_julian_day", "sin_julian_day"),
    *("cos_local_time", "sin_local_time", "insolation", "lsm", "z"),
)
FORECAST = ("msl", "2t", "10u", "t_500", "t_850", "q_850", "sst")
DIAGNOSTIC = ("tp",)
VARIABLES = (*GIVEN, *FORECAST, *DIAGNOSTIC)
LATITUDES, LONGITUDES = np.arange(80, -81, -20), np.arange(0, 360, 20)


def write_dataset(path: Path, *, num_dates: int = 60) -> Path:
    """Write an anemoi dataset of smooth waves on a coarse grid: levels, precipitation, and no sea temperature on land.

    Seas have no ``sst`` west of 180 degrees.
    """
    import zarr

    dates = np.datetime64("2020-01-01T00:00:00", "s") + np.arange(num_dates) * np.timedelta64(6, "h")
    latitudes, longitudes = (grid.ravel().astype(float) for grid in np.meshgrid(LATITUDES, LONGITUDES, indexing="ij"))
    lat, lon, hour = np.deg2rad(latitudes), np.deg2rad(longitudes), 6.0 * np.arange(num_dates)[:, None]
    land = (longitudes < 180).astype(float)
    day, time = 2 * np.pi * hour / (24 * 365.25), 2 * np.pi * hour / 24 + lon
    still = np.zeros_like(hour)
    values = {
        "cos_latitude": np.cos(lat) + still,
        "sin_latitude": np.sin(lat) + still,
        "cos_longitude": np.cos(lon) + still,
        "sin_longitude": np.sin(lon) + still,
        "cos_julian_day": np.cos(day) + 0 * lat,
        "sin_julian_day": np.sin(day) + 0 * lat,
        "cos_local_time": np.cos(time),
        "sin_local_time": np.sin(time),
        "insolation": np.maximum(0, -np.cos(time) * np.cos(lat)),
        "lsm": land + still,
        "z": 500 * land * np.cos(lat) ** 2 + still,
    }
    for number, name in enumerate((*FORECAST, *DIAGNOSTIC)):
        phase = (1 + number % 3) * lon - hour / (10 + 3 * number) + number
        values[name] = 280 + 10 * number + 5 * np.cos(lat) * np.sin(phase) + np.cos(2 * lat + hour / 30)
    values["tp"] = np.maximum(0, values["tp"] - 352) / 100
    values["sst"] = np.where(land > 0, np.nan, values["sst"])
    data = np.stack([values[name] for name in VARIABLES], 1)[:, :, None, :].astype(np.float32)
    root = zarr.open_group(str(path), mode="w")
    root.create_dataset("data", data=data, chunks=(1, *data.shape[1:]))
    for name, array in (("dates", dates), ("latitudes", latitudes), ("longitudes", longitudes)):
        root.create_dataset(name, data=array)
    for name, function in (("mean", np.nanmean), ("stdev", np.nanstd), ("minimum", np.nanmin), ("maximum", np.nanmax)):
        root.create_dataset(name, data=function(data.astype(np.float64), axis=(0, 2, 3)))
    root.attrs.update(
        allow_nans=True,
        constant_fields=[],
        data_request={"param_level": {}},
        dimensions=["dates", "variables", "ensembles", "values"],
        dtype="float32",
        ensemble_dimension=2,
        field_shape=[LATITUDES.size, LONGITUDES.size],
        frequency="6h",
        missing_dates=[],
        resolution="o2",
        start_date=str(dates[0]),
        end_date=str(dates[-1]),
        statistics_start_date=str(dates[0]),
        statistics_end_date=str(dates[-1]),
        uuid="11111111-2222-3333-4444-555555555555",
        variables=list(VARIABLES),
        variables_metadata={name: {"units": "1"} for name in VARIABLES},
        version="0.30",
    )
    return path


#: Whatever their defaults say about data that the small dataset does not have, and their sizes.
SMALL = (
    "system.input.graph=null",
    "system.hardware.accelerator=cpu",
    "diagnostics.log.mlflow={enabled:false,tracking_uri:null}",
    "diagnostics.plot.callbacks=[]",
    "diagnostics.enable_checkpointing=false",
    "diagnostics.enable_progress_bar=false",
    "dataloader.num_workers={training:0,validation:0,test:0}",
    "dataloader.batch_size={training:1,validation:2,test:2}",
    "dataloader.training.datasets.data.end=2020-01-11",
    "dataloader.validation.datasets.data.start=2020-01-12",
    "dataloader.validation.datasets.data.end=2020-01-15",
    "dataloader.test.datasets.data.start=2020-01-12",
    "dataloader.limit_batches.validation=null",
    "model.num_channels=8",
    "training.precision='32'",
    "training.optimization.lr=1e-3",
    "training.optimization.lr_scheduler.warmup_t=5",
    f"data.datasets.data.forcing=[{','.join(GIVEN)}]",
    "data.datasets.data.diagnostic=[tp]",
    "data.datasets.data.processors.normalizer.config.max=[z]",
    "data.datasets.data.processors.normalizer.config.none=[lsm,insolation,cos_latitude,cos_longitude,sin_latitude,"
    "sin_longitude,cos_julian_day,cos_local_time,sin_julian_day,sin_local_time]",
    "training.metrics.datasets.data=[msl,t_850]",
)


#: Imputer, remapper, a bounded diagnostic variable, scalers by variable, level and missing value, clipping by value,
#: and a rollout that grows from 1 to 3.
PROCESSED = (
    "config_validation=false",
    "graph.nodes.hidden.node_builder.resolution=1",
    "task.rollout={start:1,epoch_increment:1,maximum:3}",
    "+data.datasets.data.processors.imputer="
    "{_target_:anemoi.models.preprocessing.imputer.InputImputer,config:{default:none,mean:[sst]}}",
    "+data.datasets.data.processors.remapper="
    "{_target_:anemoi.models.preprocessing.remapper.Remapper,config:{default:none,log1p:[tp]}}",
    "training.training_loss.datasets.data.scalers="
    "[pressure_level,general_variable,nan_mask_weights,node_weights,time_steps]",
    "training.gradient_clip.val=0.01",
)
#: Nothing that a forecast cannot start from: sea temperature is missing on land.
SMALL_GAPS = "dataloader.dataset={dataset:${system.input.dataset},drop:[sst]}"
#: ``ensemble_crps`` on a coarse grid, without what its defaults read from files.
ENSEMBLE = (
    SMALL_GAPS,
    "~graph.nodes.hidden.node_builder.grid",
    "+graph.nodes.hidden.node_builder.resolution=1",
    "graph.nodes.hidden.node_builder._target_=anemoi.graphs.nodes.TriNodes",
    "model.num_channels=16",
    "model.processor.attention_implementation=scaled_dot_product_attention",
    "model.processor.num_layers=2",
    "system.input.truncation=null",
    "system.input.truncation_inv=null",
    "training.max_epochs=null",
)
#: Samples of the small dataset's splits, as the process that opens the data would report them.
SAMPLES = Facts(training=42, validation=14)


def compose_small(name: str, *overrides: str, root: Path, ranks: int = 1, ours: tuple[str, ...] = ()) -> Config:
    """Compose one of anemoi-training's own configurations for the small dataset, which is written into ``root``."""
    dataset, empty = root / "small.zarr", root / "theirs"
    if not dataset.exists():
        write_dataset(dataset)
    empty.mkdir(exist_ok=True)
    places = (f"system.input.dataset={dataset}", f"system.output.root={root}")
    asked = (f"task.config={empty}", f"task.name={name}", f"task.overrides={json.dumps([*places, *SMALL, *overrides])}")
    with mock.patch.object(facts, "describe", return_value=SAMPLES):
        return compose(["task=anemoi", *asked, f"launcher.ranks={ranks}", "run.seed=1234", *ours]).config


def train_theirs(
    world: World, ours: Config, after_batch: Callable[[float], None] | None = None, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train ``ours`` by anemoi-training's own Trainer on the same batches; return what it computed, save if asked to.

    ``after_batch`` is called with the loss of each batch when the Trainer is done with it.
    """
    import pytorch_lightning as pl

    trainer_class = import_anemoi_training().AnemoiTrainer
    task, per_epoch, losses, validated = AnemoiTask(ours), ours.task.steps_per_epoch, [], []
    samples, sampler = order_of(task, ours, world)
    scored = task.samples("validation")

    class Told(torch.utils.data.IterableDataset):
        def __init__(self, module: Any) -> None:
            self.module = module

        def set_comm_group_info(self, *_: Any, **__: Any) -> None:
            pass

        set_ens_comm_group_info = set_comm_group_info

    class Batches(Told):
        def __iter__(self):
            for step in range(self.module.epoch * per_epoch, (self.module.epoch + 1) * per_epoch):
                yield read(task, samples, sampler, step).fields

    class Scored(Told):
        def __iter__(self):
            # Before the end of the epoch counts: theirs validates first.
            shared_by, size = ours.task.groups.sample, 2 if ours.task.groups.model == 1 else 1
            mine = range(len(scored))[world.rank // shared_by :: world.world_size // shared_by]
            for first in range(0, len(mine), size):
                step = (self.module.epoch + 1) * per_epoch - 1
                yield task.collate([scored.read(i, step=step) for i in mine[first : first + size]]).fields

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rank = world.rank // ours.task.groups.model
            seed_step(ours.run.seed, step=trainer.global_step, rank=rank)  # the same noise

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))
            if after_batch is not None:
                after_batch(losses[-1])

        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
            if batch_idx == 0:
                seed_step(ours.run.seed, step=trainer.global_step, rank=world.rank)

        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            validated.append(trainer)

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            if checkpoint is not None:
                trainer.save_checkpoint(checkpoint)

    class Theirs(trainer_class):
        run_id, logger, callbacks, profiler = "theirs", False, [Watch()], None

        def _update_paths(self) -> None:
            pass

    os.environ.update(ANEMOI_BASE_SEED=str(ours.run.seed), TORCHELASTIC_RUN_ID="theirs")
    theirs = Theirs(DictConfig(ours.task.settings))
    theirs.datamodule.train_dataloader = lambda: DataLoader(Batches(theirs.datamodule), batch_size=None)
    theirs.datamodule.val_dataloader = lambda: DataLoader(Scored(theirs.datamodule), batch_size=None)
    theirs.train()
    metrics = {name: float(value) for name, value in validated[-1].callback_metrics.items()}
    parameters = {f"method.{name}": p.detach().clone() for name, p in theirs.model.named_parameters()}
    return {"losses": losses, "metrics": metrics, "parameters": parameters}


def order_of(task: Task, config: Config, world: World) -> tuple[Samples, MicroBatchSampler]:
    """Return the samples of training, and this rank's sampler."""
    samples = task.samples("train")
    order = GlobalSampleOrder(len(samples), seed=config.run.seed)
    plan = plan_batches(config, world_size=world.world_size)
    return samples, MicroBatchSampler(order, plan=plan, rank=world.rank)


def read(task: Task, samples: Samples, sampler: MicroBatchSampler, step: int, micro: int = 0) -> Batch:
    return task.collate([samples.read(index, step=step) for index in sampler.samples(step, micro)])


def steps_of(task: Task, config: Config, world: World, *, start: int = 0) -> Iterator[tuple[int, list[Batch]]]:
    """Yield number and micro-batches of every step from ``start`` to the end, as the trainer begins it."""
    samples, sampler = order_of(task, config, world)
    for step in range(start, config.training.max_steps):
        task.begin_step(step)
        seed_step(config.run.seed, step=step, rank=world.rank // config.task.groups.model)
        yield step, [read(task, samples, sampler, step, micro) for micro in range(sampler.plan.accumulation)]


def train_ours(world: World, config: Config) -> dict[str, Any]:
    """Train ``config`` by this package's engine and return the same as :func:`train_theirs`."""
    task = create_task(config)
    module = task.create_module(world_size=world.world_size // config.task.groups.sample)
    engine = create_engine(module, config=config, world=world)
    losses = [engine.train_step(batches).loss for _, batches in steps_of(task, config, world)]
    seed_step(config.run.seed, step=config.training.max_steps, rank=world.rank)  # as the trainer does
    evaluation = task.evaluate("validation", evaluate=engine.evaluate, world=world)
    parameters = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return {"losses": losses, "metrics": dict(evaluation.metrics), "parameters": parameters}
