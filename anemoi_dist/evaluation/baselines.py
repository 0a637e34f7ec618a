"""Baselines that a model has to beat: persistence, climatology, tide with damped tendency."""

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
    """Baseline forecasts fitted to the training split.

    ``tide_tendency`` adds to the last state, at every step, the mean change at that time of day and place (the tide)
    and the last change's departure from it, which a factor per variable damps from step to step.

    Attributes
    ----------
    spec : DataSpec
        Variables and grid.
    climatology : torch.Tensor
        float32, shape (ensemble, grid, prognostic): mean over the training split, physical units.
    tide : torch.Tensor
        float32, shape (time of day, ensemble, grid, prognostic): mean change over the step that starts then.
    damping : torch.Tensor
        float32, shape (prognostic,): fraction of a departure that persists in the next step, from -1 to 1.
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
        """Fit to the training split. Collective: each rank reads its share, all get the same result.

        Parameters
        ----------
        train : WeatherDataset
            The training split.
        max_samples : int or None
            Samples read at most over all ranks, evenly spaced over the split and over the times of day; None: all.
        world : World, optional
            The ranks that share the samples. None: all are read here.
        """
        spec = train.spec()
        sums = _Sums.empty(train, spec)
        picked = evenly_spaced(len(train), at_most=max_samples, frequency_s=spec.frequency_s)
        for index in share(picked, world):
            beat()  # reading 256 samples may take longer than the watchdog's timeout
            sums.add(train[int(index)], spec)
        # Sums, not means: ranks may have read different numbers of samples.
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
            On the CPU; only its input states are read, never the truth behind them.

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
        # From a single input state no change is known: the tide alone remains.
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
        # float64: sums of squares of 100 000 Pa over hundreds of samples leave float32 no digits for the changes.
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
        # A short split may lack some times of day.
        count = self.count.clamp(min=1)
        each = count.reshape(-1, 1, 1, 1)
        # Least squares of `now` on `before`, both as departures from their mean at that time of day and place. Sums of
        # products less products of sums need one pass over the data.
        product = self.product - self._mean(self.now * self.before / each).sum(0)
        square = self.square - self._mean(self.before.square() / each).sum(0)
        # Relative to the uncentred sum: for a variable without departures the difference is rounding alone.
        damping = torch.where(square > 1e-9 * self.square, product / square, torch.zeros_like(square))
        return Baselines(
            spec=spec,
            climatology=(self.state / self.count.sum()).float(),
            tide=(self.now / each).float(),
            # Beyond 1 departures would grow from step to step.
            damping=damping.clamp(-1, 1).float(),
        )


def latitude_weights(latitudes: np.ndarray) -> Tensor:
    """Return cos(latitude) scaled to a sum of 1, float64, shape (grid,)."""
    weights = np.cos(np.deg2rad(latitudes)).clip(min=0)  # rounding must not give a pole row a negative area
    return torch.from_numpy(weights / weights.sum())


def time_of_day(dates: Tensor, *, frequency_s: int) -> Tensor:
    """Return the index of each date's time of day, for dates in seconds since 1970-01-01 UTC."""
    return dates.remainder(DAY_S).div(DAY_S // times_of_day(frequency_s), rounding_mode="floor")


def share(samples: np.ndarray, world: World | None) -> np.ndarray:
    """Return every n-th of ``samples``, starting with this rank's number."""
    # Interleaved, so that every rank reads all seasons and has at most one sample more than another.
    return samples if world is None else samples[world.rank :: world.world_size]


def all_reduce(total: Tensor, *, world: World | None) -> None:
    """Add a CPU tensor over all ranks, in place; alone, do nothing."""
    if world is not None:
        # The control group is on the CPU: float64 sums need no copy to a GPU.
        dist.all_reduce(total, group=world.control_group)
