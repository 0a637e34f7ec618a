"""Forecasts that need no training, which a model has to beat: persistence, climatology, tide and damped tendency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.data.dataset import WeatherDataset
from anemoi_dist.data.fields import DAY_S, evenly_spaced, times_of_day
from anemoi_dist.distributed.world import World
from anemoi_dist.telemetry.heartbeat import beat

PERSISTENCE = "persistence"
CLIMATOLOGY = "climatology"
TIDE_TENDENCY = "tide_tendency"
BASELINES = (PERSISTENCE, CLIMATOLOGY, TIDE_TENDENCY)


@dataclass(frozen=True)
class Baselines:
    """What the training block says without a model.

    ``tide_tendency`` is, from the last state on: the mean change at that time of day and place (the tide), plus the
    last change's departure from it, damped by a factor per variable at every step.

    Attributes
    ----------
    spec : DataSpec
        Variables and grid.
    climatology : torch.Tensor
        float32, shape (ensemble, grid, prognostic): mean over the training block, physical units.
    tide : torch.Tensor
        float32, shape (time of day, ensemble, grid, prognostic): mean change over one step that starts then.
    damping : torch.Tensor
        float32, shape (prognostic,): share of the last change's departure that returns in the next, from -1 to 1.
    """

    spec: DataSpec
    climatology: Tensor
    tide: Tensor
    damping: Tensor

    @classmethod
    def fit(
        cls,
        train: WeatherDataset,
        *,
        max_samples: int | None = 256,
        world: World | None = None,
    ) -> Baselines:
        """Fit to the training block. Collective: each rank reads its share, all get the same.

        Parameters
        ----------
        train : WeatherDataset
            The training block.
        max_samples : int or None
            Samples read at most over all ranks, evenly spaced over the block and over the times of day; None: all.
        world : World, optional
            This rank's place: each rank reads its share. None: all are read here.
        """
        spec = train.spec()
        sums = _Sums.empty(train, spec)
        picked = evenly_spaced(len(train), at_most=max_samples, frequency_s=spec.frequency_s)
        for index in share(picked, world):
            beat()
            sums.add(train[int(index)], spec)
        for total in (sums.state, sums.now, sums.before, sums.product, sums.square, sums.count):
            all_reduce(total, world=world)
        return sums.baselines(spec)

    def forecast(self, name: str, batch: Batch, *, rollout: int) -> Tensor:
        """Forecast ``rollout`` steps.

        Parameters
        ----------
        name : str
            One of :data:`BASELINES`.
        batch : Batch
            On the CPU; only its input states are read.

        Returns
        -------
        torch.Tensor
            float32, physical units, shape (batch, rollout, ensemble, grid, prognostic).
        """
        inputs = batch.fields[:, : self.spec.multistep_input][..., self.spec.prognostic_indices]
        last = inputs[:, -1]
        if name == PERSISTENCE:
            return last.unsqueeze(1).expand(-1, rollout, *last.shape[1:])
        if name == CLIMATOLOGY:
            return self.climatology.expand(len(last), rollout, *last.shape[1:])
        if name == TIDE_TENDENCY:
            return self._tide_tendency(inputs, batch.dates, rollout=rollout)
        raise ValueError(f"name={name!r}: must be one of {', '.join(BASELINES)}")

    def _tide_tendency(self, inputs: Tensor, dates: Tensor, *, rollout: int) -> Tensor:
        state, step_s = inputs[:, -1], self.spec.frequency_s
        departure = torch.zeros_like(state)
        if inputs.shape[1] > 1:
            departure = state - inputs[:, -2] - self.tide[time_of_day(dates - step_s, frequency_s=step_s)]
        states = []
        for step in range(rollout):
            departure = departure * self.damping
            state = state + self.tide[time_of_day(dates + step * step_s, frequency_s=step_s)] + departure
            states.append(state)
        return torch.stack(states, 1)


@dataclass
class _Sums:
    """Sums over samples, float64, of states and of the changes from (``now``) and up to (``before``) the last input.

    ``product`` and ``square`` are area means, shape (prognostic,); the others keep the place.
    """

    state: Tensor
    now: Tensor
    before: Tensor
    product: Tensor
    square: Tensor
    count: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, train: WeatherDataset, spec: DataSpec) -> _Sums:
        num_times = times_of_day(spec.frequency_s)
        place = (train.fields.shape[2], len(spec.latitudes), len(spec.prognostic))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        weights = latitude_weights(spec.latitudes)
        return cls(
            zeros(*place),
            zeros(num_times, *place),
            zeros(num_times, *place),
            zeros(place[-1]),
            zeros(place[-1]),
            zeros(num_times),
            weights,
        )

    def add(self, sample: Batch, spec: DataSpec) -> None:
        states = sample.fields[..., spec.prognostic_indices].double()
        last = spec.multistep_input - 1
        now = states[last + 1] - states[last]
        before = states[last] - states[last - 1] if last else torch.zeros_like(now)
        time = int(time_of_day(sample.dates, frequency_s=spec.frequency_s))
        self.state += states[last]
        self.now[time] += now
        self.before[time] += before
        self.product += self._mean(now * before)
        self.square += self._mean(before * before)
        self.count[time] += 1

    def _mean(self, values: Tensor) -> Tensor:
        """Return the area and ensemble mean of shape (..., ensemble, grid, prognostic)."""
        return torch.einsum("...egv,g->...v", values, self.weights) / values.shape[-3]

    def baselines(self, spec: DataSpec) -> Baselines:
        count = self.count.clamp(min=1)
        each = count.reshape(-1, 1, 1, 1)
        # Least squares of `now` on `before`, both as departures from their mean at that time of day and place.
        product = self.product - self._mean(self.now * self.before / each).sum(0)
        square = self.square - self._mean(self.before.square() / each).sum(0)
        damping = torch.where(square > 1e-9 * self.square, product / square, torch.zeros_like(square))
        return Baselines(
            spec=spec,
            climatology=(self.state / self.count.sum()).float(),
            tide=(self.now / each).float(),
            damping=damping.clamp(-1, 1).float(),
        )


def latitude_weights(latitudes: np.ndarray) -> Tensor:
    """Return cos(latitude) scaled to a sum of 1, float64, shape (grid,)."""
    weights = np.cos(np.deg2rad(latitudes)).clip(min=0)
    return torch.from_numpy(weights / weights.sum())


def time_of_day(dates: Tensor, *, frequency_s: int) -> Tensor:
    """Return which of the day's distinct state times each date has, for dates in seconds since 1970."""
    return dates.remainder(DAY_S).div(DAY_S // times_of_day(frequency_s), rounding_mode="floor")


def share(samples: np.ndarray, world: World | None) -> np.ndarray:
    """Return every n-th of ``samples``, from this rank's number on."""
    return samples if world is None else samples[world.rank :: world.world_size]


def all_reduce(total: Tensor, *, world: World | None) -> None:
    """Add a CPU tensor over all ranks, in place; alone, do nothing."""
    if world is not None:
        dist.all_reduce(total, group=world.control_group)
