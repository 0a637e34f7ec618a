"""One attempt on one rank: from the frozen configuration to the trainer and through to the end."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from anemoi_dist.checkpoint.locate import open_store
from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.select import select
from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.schema import Config
from anemoi_dist.data.anemoi import WeatherDataset, open_split
from anemoi_dist.data.loader import build_loader
from anemoi_dist.data.sampler import GlobalSampleOrder
from anemoi_dist.distributed.control_word import StopRequest
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import Engine
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.errors import AnemoiDistError, ExitCode
from anemoi_dist.evaluation.baselines import Baselines
from anemoi_dist.evaluation.summary import Score, format_table
from anemoi_dist.evaluation.validator import Validator, save_forecast_maps
from anemoi_dist.optimizers.learning_rate import scaled_rate
from anemoi_dist.run.attempt import end_state
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.forecast.module import BaseGraphModule
from anemoi_dist.telemetry.heartbeat import beat
from anemoi_dist.telemetry.progress import format_bytes
from anemoi_dist.training.recorder import Telemetry
from anemoi_dist.training.trainer import Trainer

_PACKAGES = ("anemoi-dist", "torch", "deepspeed", "timm", "hydra-core", "anemoi-datasets", "numpy", "safetensors")


class Evaluation:
    """Scores the forecast on the validation and the test block; both are opened at once, so that neither fails late.

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
        longest = max(config.validation.lead_steps)
        self._blocks = {split: open_split(config.data, split, rollout=longest) for split in ("validation", "test")}
        for split, block in self._blocks.items():
            if shared := np.intersect1d(train.dates_s, block.dates_s).size:
                telemetry.message(
                    f"warning: {shared} of the {block.dates_s.size} dates of the {split} block are in the training "
                    f"block too: its scores flatter the model (data.train.end, data.{split}.start keep them apart)"
                )

    def __call__(self, split: str, step: int) -> list[Score]:
        """Score, record, show and return. Collective. The test block also gives the maps of the report."""
        validator = self._validator(split)
        scores = validator.run(self._predict)
        table = f"{split} block after step {step}:\n{format_table(scores)}"
        self._telemetry.validation(step, split, [score.as_dict() for score in scores], table)
        if split == "test":
            maps = validator.forecast_maps(self._predict)
            if self._world.is_main:
                save_forecast_maps(self._run.report_dir / "forecast.npz", maps=maps)
        return scores

    def _predict(self, batch: Any, rollout: int) -> torch.Tensor:
        return self._engine.predict(batch.to(self._world.device), rollout=rollout)

    def _validator(self, split: str) -> Validator:
        ranks = {"rank": self._world.rank, "world_size": self._world.world_size, "group": self._world.control_group}
        if self._baselines is None:
            self._baselines = Baselines.fit(self._train, **ranks)
        if split not in self._validators:
            options = self._config.validation
            self._validators[split] = Validator(
                self._blocks[split],
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
    world.outlast(config.watchdog.timeout_s)
    selection = select(open_store(run, config.checkpoint.url), world=world, strict=config.checkpoint.strict)
    checkpoint = selection.checkpoint
    first_step = checkpoint.manifest.step if checkpoint else 0
    telemetry = Telemetry(
        run, config, is_main=world.is_main, total_steps=config.training.max_steps, first_step=first_step
    )
    code, trainer, loader = ExitCode.INTERNAL, None, None
    try:
        for step, reason in selection.passed_over.items():
            telemetry.event("passed_over", step=step, reason=reason)
            telemetry.message(f"checkpoint of step {step} is passed over: {reason}")
        with telemetry.phase("startup"):
            dataset = open_split(config.data, "train", rollout=config.training.rollout)
            trainer = _build(
                config,
                run=run,
                world=world,
                telemetry=telemetry,
                stop=stop,
                dataset=dataset,
                broken=selection.passed_over,
            )
            world.outlast(config.watchdog.timeout_s)  # once more: engines make groups of their own
            if checkpoint is not None:
                _note_scaled_rate(
                    config, telemetry, step=first_step, was=checkpoint.manifest.world_size, now=world.world_size
                )
                trainer.resume(checkpoint)
                checkpoint.close()
            _announce(trainer, run=run, attempt=attempt, resumed=checkpoint is not None, num_samples=len(dataset))
            loader = build_loader(
                dataset,
                order=GlobalSampleOrder(len(dataset), seed=config.run.seed),
                plan=plan_batches(config.training, world_size=world.world_size),
                rank=world.rank,
                start_step=first_step,
                data_config=config.data,
                pin_memory=world.device.type == "cuda",
            )
        trainer.fit(loader)
        telemetry.message(f"finished; for figures and maps: anemoi-dist report {run.path}")
        code = ExitCode.FINISHED
    except AnemoiDistError as error:
        code = error.exit_code
        raise
    finally:
        step = trainer.progress.step if trainer else first_step
        telemetry.event("end", step=step, state=end_state(code), exit_code=int(code), seconds=telemetry.seconds())
        telemetry.close()
        if loader is not None:
            loader.close()
    trainer.engine.close()


def _build(
    config: Config,
    *,
    run: RunDirectory,
    world: World,
    telemetry: Telemetry,
    stop: StopRequest,
    dataset: WeatherDataset,
    broken: Collection[int],
) -> Trainer:
    torch.manual_seed(config.run.seed)  # the same initial parameters on every rank
    beat()
    module = BaseGraphModule(config, spec=dataset.spec(), world_size=world.world_size)
    beat()
    engine = create_engine(module, config=config, world=world)
    beat()
    return Trainer(
        config=config,
        world=world,
        engine=engine,
        store=open_store(run, config.checkpoint.url),
        telemetry=telemetry,
        stop=stop,
        validate=Evaluation(config=config, world=world, engine=engine, run=run, telemetry=telemetry, train=dataset),
        origin=_origin(config),
        broken=broken,
    )


def _announce(trainer: Trainer, *, run: RunDirectory, attempt: int, resumed: bool, num_samples: int) -> None:
    """Record and show what starts here, with the bytes that every rank holds. Collective."""
    world, config, step = trainer.world, trainer.config, trainer.progress.step
    memory = [json.loads(text) for text in world.gather_text(json.dumps(asdict(trainer.engine.memory())))]
    plan = plan_batches(config.training, world_size=world.world_size)
    trainer.telemetry.event(
        "start",
        step=step,
        run_id=run.run_id,
        attempt=attempt,
        resumed_from_step=step if resumed else None,
        world_size=world.world_size,
        device=_device_name(world.device),
        num_parameters=trainer.engine.num_parameters(),
        num_train_samples=num_samples,
        batch=asdict(plan),
        memory=memory,
        **asdict(trainer.origin),
    )
    if world.is_main:
        states = "\n".join(f"  rank {rank}: {_states_text(held)}" for rank, held in enumerate(memory[:4]))
        trainer.telemetry.message(
            f"run {run.run_id} in {run.path}\n"
            f"{'resumes at step ' + str(step) if resumed else 'starts'}: {trainer.origin.engine} on "
            f"{world.world_size} ranks ({_device_name(world.device)}), {trainer.engine.num_parameters()} parameters, "
            f"{num_samples} samples, {plan.global_size} a step = {world.world_size} ranks x {plan.accumulation} x "
            f"{plan.micro_size}\noptimizer states:\n{states}" + ("\n  ..." if len(memory) > 4 else "")
        )


def _note_scaled_rate(config: Config, telemetry: Telemetry, *, step: int, was: int, now: int) -> None:
    """Say what ``training.lr.scale_with: world_size`` does to the rate of a run that has changed its size."""
    if was == now or config.training.lr.scale_with == "none":
        return
    old, new = (scaled_rate(config.training.lr, size) for size in (was, now))
    telemetry.event("rescaled_rate", step=step, world_size_was=was, world_size=now, rate_was=old, rate=new)
    telemetry.message(
        f"training.lr.scale_with=world_size: {now} ranks instead of {was} make the rate {new:g} instead of {old:g}; "
        "training.lr.scale_with=none keeps it"
    )


def _states_text(memory: dict[str, Any]) -> str:
    emas = {kind: num_bytes for kind, num_bytes in memory["states"].items() if kind != "step"}
    return ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in emas.items())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _origin(config: Config) -> Origin:
    digest = hashlib.sha256(repr(asdict(config)).encode()).hexdigest()[:16]
    return Origin(engine=config.engine.spec.name, config_hash=digest, versions=_versions())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
