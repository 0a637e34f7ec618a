"""Validation: latitude-weighted RMSE and anomaly correlation of the model and of the baselines."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anemoi_dist.data.batch import Batch, collate
from anemoi_dist.data.dataset import WeatherDataset
from anemoi_dist.data.fields import evenly_spaced
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import ConfigError
from anemoi_dist.evaluation.baselines import BASELINES, PERSISTENCE, Baselines, all_reduce, latitude_weights, share
from anemoi_dist.evaluation.summary import Score
from anemoi_dist.telemetry.heartbeat import beat

MODEL = "model"
#: ``predict(batch, rollout)`` returns physical units, shape (batch, rollout, ensemble, grid, prognostic).
Predict = Callable[[Batch, int], Tensor]


class Validator:
    """Scores forecasts of one split, on all ranks together.

    Parameters
    ----------
    dataset : WeatherDataset
        The split, opened with a rollout of at least the longest lead.
    baselines : Baselines
        Fitted to the training split.
    lead_steps : Sequence[int]
        Forecast steps to score, 1 is the first.
    max_samples : int or None
        Samples scored at most, evenly spaced over the split and over the times of day; None: all.
    batch_size : int
        Samples in one call of ``predict``.
    world : World, optional
        The ranks that share the samples. None: all are scored here.

    Raises
    ------
    ConfigError
        A lead time exceeds the dataset's rollout.
    """

    def __init__(
        self,
        dataset: WeatherDataset,
        *,
        baselines: Baselines,
        lead_steps: Sequence[int],
        max_samples: int | None = None,
        batch_size: int = 1,
        world: World | None = None,
    ) -> None:
        self.dataset, self.baselines, self.spec, self._world = dataset, baselines, baselines.spec, world
        self.lead_steps = sorted(set(lead_steps))
        self.rollout = self.lead_steps[-1]
        if dataset.rollout < self.rollout:
            raise ConfigError(
                "validation.lead_steps", list(lead_steps), f"must not exceed the dataset's rollout of {dataset.rollout}"
            )
        self.batch_size = batch_size
        self.samples = evenly_spaced(len(dataset), at_most=max_samples, frequency_s=self.spec.frequency_s)
        self._weights = latitude_weights(self.spec.latitudes)
        self._baseline_scores: list[Score] | None = None

    @property
    def num_calls(self) -> int:
        """Number of calls of ``predict`` on every rank in one run."""
        # Rounded up: calls are collective, so a rank without samples left calls it too.
        num_ranks = self._world.world_size if self._world else 1
        return math.ceil(math.ceil(len(self.samples) / num_ranks) / self.batch_size)

    def run(self, predict: Predict) -> list[Score]:
        """Score ``predict`` and the baselines. Collective: every rank calls it, and ``predict`` equally often.

        Returns
        -------
        list[Score]
            The model's, then each baseline's; the same on every rank. Baselines are computed once.
        """
        names = [MODEL] if self._baseline_scores is not None else [MODEL, *BASELINES]
        # Last axis: squared error, anomaly correlation, samples with an anomaly.
        sums = torch.zeros(len(names), self.rollout, len(self.spec.prognostic), 3, dtype=torch.float64)
        for call in range(self.num_calls):
            beat()  # one call is a forecast of many steps; the watchdog must see progress between calls
            batch, counts = self._batch(call)
            truth = batch.fields[:, self.spec.multistep_input :][:, : self.rollout, ..., self.spec.prognostic_indices]
            for row, name in enumerate(names):
                if name == MODEL:
                    forecast = predict(batch, self.rollout).detach().cpu()
                else:
                    forecast = self.baselines.forecast(name, batch, rollout=self.rollout)
                sums[row] += torch.einsum("bkvs,b->kvs", self._terms(forecast, truth), counts)
        # One reduction of sums: means of means would weight the ranks' shares wrongly.
        all_reduce(sums, world=self._world)
        scores = [score for name, row in zip(names, sums, strict=True) for score in self._scores(name, row)]
        num_model = len(self.lead_steps) * len(self.spec.prognostic)
        # Baselines do not change during training.
        if self._baseline_scores is None:
            self._baseline_scores = scores[num_model:]
        return scores[:num_model] + self._baseline_scores

    def forecast_maps(self, predict: Predict) -> dict[str, np.ndarray]:
        """Forecast the middle sample, for :func:`save_forecast_maps`. Collective: every rank calls it.

        Returns
        -------
        dict[str, np.ndarray]
            ``truth``, ``forecast`` and ``persistence`` of the first prognostic variable and ensemble member, float32,
            shape (lead, latitude, longitude) on a regular grid and (lead, grid) on others; ``lead_s``, ``latitudes``,
            ``longitudes`` of each point or of each row and column, ``date`` (Unix seconds) and ``variable``.
        """
        # Every rank forecasts the same sample: with sharded parameters the forward pass is collective.
        batch = collate([self.dataset[len(self.dataset) // 2]])
        leads = [lead - 1 for lead in self.lead_steps]
        shape = (len(leads), *self.spec.field_shape)

        def first_variable(fields: Tensor) -> np.ndarray:
            return fields[0, leads, 0, :, 0].float().cpu().numpy().reshape(shape)

        truth = batch.fields[:, self.spec.multistep_input :][..., self.spec.prognostic_indices]
        latitudes, longitudes = self.spec.latitudes, self.spec.longitudes
        if len(self.spec.field_shape) == 2:
            latitudes = latitudes.reshape(self.spec.field_shape)[:, 0]
            longitudes = longitudes.reshape(self.spec.field_shape)[0]
        return {
            "truth": first_variable(truth),
            "forecast": first_variable(predict(batch, self.rollout).detach()),
            "persistence": first_variable(self.baselines.forecast(PERSISTENCE, batch, rollout=self.rollout)),
            "lead_s": np.array(self.lead_steps, dtype=np.int64) * self.spec.frequency_s,
            "latitudes": latitudes,
            "longitudes": longitudes,
            "date": batch.dates[0].numpy(),
            "variable": np.array(self.spec.prognostic[0]),
        }

    def _batch(self, call: int) -> tuple[Batch, Tensor]:
        """Return this rank's batch and a weight per sample: 1, or 0 for padding that only keeps ranks in step."""
        mine = share(self.samples, self._world)[call * self.batch_size :][: self.batch_size]
        padding = self.batch_size - len(mine)
        indices = [*mine, *[self.samples[0]] * padding]
        counts = torch.tensor([1.0] * len(mine) + [0.0] * padding, dtype=torch.float64)
        return collate([self.dataset[int(index)] for index in indices]), counts

    def _terms(self, forecast: Tensor, truth: Tensor) -> Tensor:
        """Return squared error, correlation and its count of each sample, shape (batch, rollout, prognostic, 3)."""
        # float64: the error of a pressure forecast is a thousandth of the pressure, its square a millionth.
        forecast, truth = forecast.double(), truth.double()
        climatology = self.baselines.climatology.double()

        def mean(values: Tensor) -> Tensor:
            return torch.einsum("bkegv,g->bkv", values, self._weights) / values.shape[2]

        anomaly, true_anomaly = forecast - climatology, truth - climatology
        norm = (mean(anomaly.square()) * mean(true_anomaly.square())).sqrt()
        # Without an anomaly there is no correlation: such samples are not counted.
        correlation = torch.where(norm > 0, mean(anomaly * true_anomaly) / norm, torch.zeros_like(norm))
        return torch.stack((mean((forecast - truth).square()), correlation, (norm > 0).double()), -1)

    def _scores(self, name: str, sums: Tensor) -> list[Score]:
        scores = []
        for index, variable in enumerate(self.spec.prognostic):
            for lead in self.lead_steps:
                squared, correlation, num_correlated = sums[lead - 1, index].tolist()
                rmse = math.sqrt(squared / len(self.samples))
                acc = correlation / num_correlated if num_correlated else None
                scores.append(Score(name, variable, lead * self.spec.frequency_s, rmse, acc))
        return scores


def save_forecast_maps(path: Path, *, maps: dict[str, np.ndarray]) -> None:
    """Write :meth:`Validator.forecast_maps` as one ``.npz``, whole or not at all. On one rank."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **maps)  # type: ignore[arg-type]
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed, so that a report made meanwhile reads the old file or the new one.
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
