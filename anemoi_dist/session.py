"""One attempt on one rank: from the frozen configuration to the trainer and through to the end."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from anemoi_dist.baselines import Baselines
from anemoi_dist.checkpoint.reader import Checkpoint, find_newest
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config import Config, plan_batches
from anemoi_dist.control import StopRequest
from anemoi_dist.data.anemoi import WeatherDataset, open_split
from anemoi_dist.data.loader import build_loader
from anemoi_dist.data.sampler import GlobalSampleOrder
from anemoi_dist.engines.base import Engine
from anemoi_dist.engines.factory import create_engine
from anemoi_dist.module import BaseGraphModule
from anemoi_dist.run_directory import RunDirectory
from anemoi_dist.telemetry.telemetry import Telemetry
from anemoi_dist.trainer import Trainer
from anemoi_dist.validation import Validator, format_table, save_forecast_maps
from anemoi_dist.world import World

_PACKAGES = ("anemoi-dist", "torch", "deepspeed", "timm", "hydra-core", "anemoi-datasets", "numpy", "safetensors")


class Evaluation:
    """Scores the forecast on a block of the data; opens the block when it is first asked for.

    Parameters
    ----------
    config, world, engine, run, telemetry
        Those of the attempt.
    train : WeatherDataset
        The baselines are fitted to it.
    """

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        engine: Engine,
        run: RunDirectory,
        telemetry: Telemetry,
        train: WeatherDataset,
    ) -> None:
        self._config, self._world, self._engine, self._run = config, world, engine, run
        self._telemetry, self._train = telemetry, train
        self._baselines: Baselines | None = None
        self._validators: dict[str, Validator] = {}

    def __call__(self, split: str, step: int) -> None:
        """Score, record and show. Collective. The test block also gives the maps of the report."""
        validator = self._validator(split)
        scores = validator.run(self._predict)
        self._telemetry.validation(step, split, [score.as_dict() for score in scores], format_table(scores))
        if split == "test":
            maps = validator.forecast_maps(self._predict)
            if self._world.is_main:
                save_forecast_maps(self._run.report_dir / "forecast.npz", maps=maps)

    def _predict(self, batch: Any, rollout: int) -> torch.Tensor:
        return self._engine.predict(batch.to(self._world.device), rollout=rollout)

    def _validator(self, split: str) -> Validator:
        ranks = {"rank": self._world.rank, "world_size": self._world.world_size, "group": self._world.control_group}
        if self._baselines is None:
            self._baselines = Baselines.fit(self._train, **ranks)
        if split not in self._validators:
            options = self._config.validation
            self._validators[split] = Validator(
                open_split(self._config.data, split, rollout=max(options.lead_steps)),
                baselines=self._baselines,
                spec=self._train.spec(),
                lead_steps=options.lead_steps,
                max_samples=options.max_samples,
                batch_size=plan_batches(self._config.training, world_size=self._world.world_size).micro_size,
                **ranks,
            )
        return self._validators[split]


def train(config: Config, *, run: RunDirectory, world: World, attempt: int) -> None:
    """Train a run to its end on this rank. Collective.

    Raises
    ------
    AnemoiDistError
        The run ended in a way that has its own exit code.
    """
    stop = StopRequest(run, is_main=world.is_main)
    stop.listen()
    plan = plan_batches(config.training, world_size=world.world_size)
    store = LocalStore(run.checkpoints_dir)
    checkpoint, notes = _newest(store, world)
    first_step = checkpoint.manifest.step if checkpoint else 0

    telemetry = Telemetry(
        run, config, is_main=world.is_main, total_steps=config.training.max_steps, first_step=first_step
    )
    engine = loader = None
    try:
        for note in notes:
            telemetry.message(note)
        dataset = open_split(config.data, "train", rollout=config.training.rollout)
        torch.manual_seed(config.run.seed)
        module = BaseGraphModule(config, spec=dataset.spec(), world_size=world.world_size)
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        engine = create_engine(module, config=config, world=world)
        facts = _facts(config, engine)
        trainer = Trainer(
            config=config,
            world=world,
            engine=engine,
            store=store,
            telemetry=telemetry,
            stop=stop,
            validate=Evaluation(config=config, world=world, engine=engine, run=run, telemetry=telemetry, train=dataset),
            facts=facts,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
            checkpoint.close()
        memory = world.gather_text(json.dumps(asdict(engine.memory())))
        telemetry.event(
            "start",
            step=first_step,
            run_id=run.run_id,
            attempt=attempt,
            resumed_from_step=first_step if checkpoint else None,
            world_size=world.world_size,
            device=str(world.device.type),
            num_parameters=num_parameters,
            num_train_samples=len(dataset),
            batch=asdict(plan),
            memory=[json.loads(text) for text in memory],
            **facts,
        )
        loader = build_loader(
            dataset,
            order=GlobalSampleOrder(len(dataset), seed=config.run.seed),
            plan=plan,
            rank=world.rank,
            start_step=first_step,
            data_config=config.data,
            pin_memory=world.device.type == "cuda",
        )
        trainer.fit(loader)
    finally:
        if loader is not None:
            loader.close()
        telemetry.close()
    engine.close()


def _newest(store: LocalStore, world: World) -> tuple[Checkpoint | None, list[str]]:
    """Let rank 0 choose the newest checkpoint that verifies; all ranks open that one."""
    notes: list[str] = []
    name = ""
    if world.is_main and (found := find_newest(store, report=notes.append)) is not None:
        name = found.folder.name
        found.close()
    name = world.broadcast_text(name if world.is_main else None)
    return (Checkpoint(store.folder / name) if name else None), notes


def _facts(config: Config, engine: Engine) -> dict[str, Any]:
    name = config.engine.kind if config.engine.kind != "deepspeed" else f"zero{config.engine.stage}"
    if config.engine.offload:
        name += "_offload"
    digest = hashlib.sha256(repr(asdict(config)).encode()).hexdigest()[:16]
    return {"engine": name, "config_hash": digest, "versions": _versions()}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
