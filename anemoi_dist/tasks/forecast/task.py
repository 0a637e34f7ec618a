"""Forecast task: windows of states, a model of the tendency, scores compared with baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.schema import Config
from anemoi_dist.data.anemoi import WeatherDataset, open_split
from anemoi_dist.data.batch import Batch, collate
from anemoi_dist.distributed.world import World
from anemoi_dist.evaluation.baselines import Baselines
from anemoi_dist.evaluation.summary import format_table, metrics, summarise
from anemoi_dist.evaluation.validator import Validator, save_forecast_maps
from anemoi_dist.process.output import LOSSES
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.base import Evaluate, Evaluation, Start
from anemoi_dist.tasks.forecast.module import BaseGraphModule

#: Splits that are scored, opened with the rollout of the longest lead time.
_SCORED = ("validation", "test")


class ForecastTask:
    """Weather forecasting, the built-in task; see :class:`anemoi_dist.tasks.base.Task`.

    Parameters
    ----------
    config : Config
        ``data``, ``model``, ``training`` and ``validation`` are used.

    Raises
    ------
    ConfigError
        The training split cannot be opened or holds no sample.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        # At once: a wrong path must fail before model and engine are built.
        self._train = open_split(config.data, "train", rollout=config.training.rollout)
        self._validators: dict[str, Validator] = {}

    def samples(self, split: str) -> WeatherDataset:
        """Return the windows of a split; scored splits hold the truth of the longest lead time."""
        return self._train if split == "train" else self._scored[split]

    def collate(self, samples: Sequence[Batch]) -> Batch:
        """Stack samples along a new first axis."""
        return collate(samples)

    def warnings(self) -> list[str]:
        """Name the scored splits that share dates with the training split."""
        return [
            f"warning: {num_shared} of the {split.dates_s.size} dates of the {name} split are in the training split "
            f"too: its scores flatter the model (data.train.end, data.{name}.start keep them apart)"
            for name, split in self._scored.items()
            if (num_shared := np.intersect1d(self._train.dates_s, split.dates_s).size)
        ]

    def create_module(self, *, world_size: int = 1) -> BaseGraphModule:
        """Build model, loss and normalisation from the statistics of the training split."""
        return BaseGraphModule(self._config, spec=self._train.spec(), world_size=world_size)

    def load_initial(self, module: BaseGraphModule) -> Start:
        """Load nothing: a new run begins with random weights."""
        return Start()

    def begin_step(self, step: int) -> None:
        """Do nothing: every step is alike."""

    def evaluate(self, split: str, *, evaluate: Evaluate, world: World) -> Evaluation:
        """Score forecast and baselines by latitude-weighted RMSE and anomaly correlation. Collective."""
        scores = self._validator(split, world).run(_predict(evaluate, world.device))
        return Evaluation(
            scores=[score.as_dict() for score in scores],
            table=format_table(scores),
            metrics=metrics(scores),
            summary=summarise(scores),
        )

    def after_save(self, step: int, *, run: RunDirectory, world: World) -> list[str]:
        """Do nothing: a checkpoint is all there is."""
        return []

    def export(self, run: RunDirectory, *, evaluate: Evaluate, world: World) -> list[str]:
        """Write ``forecast.npz``, the maps of one forecast of the test split. Collective; rank 0 writes."""
        # On every rank, also those that write nothing: the forward pass is collective.
        maps = self._validator("test", world).forecast_maps(_predict(evaluate, world.device))
        if not world.is_main:
            return []
        path = run.report_dir / "forecast.npz"
        try:
            save_forecast_maps(path, maps=maps)
        except OSError as error:  # a full disk: what was trained is saved
            LOSSES.note(str(path), error)
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a forecast task has no state but its tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""

    @cached_property
    def _scored(self) -> dict[str, WeatherDataset]:
        longest = max(self._config.validation.lead_steps)
        return {split: open_split(self._config.data, split, rollout=longest) for split in _SCORED}

    def _validator(self, split: str, world: World) -> Validator:
        if split not in self._validators:
            plan = plan_batches(self._config, world_size=world.world_size)
            self._validators[split] = Validator(
                self._scored[split],
                baselines=self._baselines(world),
                lead_steps=self._config.validation.lead_steps,
                max_samples=self._config.validation.max_samples,
                # A size that is known to fit into memory, since training uses it with gradients.
                batch_size=plan.micro_size,
                world=world,
            )
        return self._validators[split]

    def _baselines(self, world: World) -> Baselines:
        """Return the baselines, fitted once: all validators compare with the same."""
        # Fitting is collective; ranks validate the same splits in the same order.
        fitted = next(iter(self._validators.values()), None)
        return fitted.baselines if fitted else Baselines.fit(self._train, world=world)


def _predict(evaluate: Evaluate, device: torch.device) -> Any:
    return lambda batch, rollout: evaluate(batch.to(device), rollout=rollout)
