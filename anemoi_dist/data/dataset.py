"""Samples for training and validation: windows of consecutive states without missing dates."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.data.fields import Fields, normalisation, seconds, tendency_stdev, window_starts
from anemoi_dist.errors import ConfigError


class WeatherDataset(Dataset):
    """Windows of ``multistep_input + rollout`` consecutive states of one split.

    A window that touches a missing date or a gap in time is left out and counted, never read.

    Parameters
    ----------
    fields : Fields
        The split that samples come from.
    train : Fields
        The training split, for statistics: normalisation must not depend on the other splits.
    forcing : tuple[str, ...]
        Variables that are given, not forecast.
    multistep_input, rollout : int
        Input states and forecast steps of one sample.
    name : str
        Name of the split, for messages.

    Attributes
    ----------
    num_dropped : int
        Windows left out because of a missing date or a gap.

    Raises
    ------
    ConfigError
        The split holds no window, or a forcing variable is unknown.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        train: Fields,
        forcing: tuple[str, ...] = (),
        multistep_input: int,
        rollout: int,
        name: str = "train",
    ) -> None:
        _check_fields(fields, forcing)
        self.fields, self.train, self.forcing = fields, train, tuple(forcing)
        self.multistep_input, self.rollout = multistep_input, rollout
        self.dates_s = seconds(fields.dates)
        self.frequency_s = round(fields.frequency.total_seconds())
        # Found once, here: a sample that fails in a data worker hours later would end the run.
        self.starts = window_starts(self.dates_s, fields.missing, window=self.window, frequency_s=self.frequency_s)
        self.num_dropped = max(0, len(self.dates_s) - self.window + 1) - len(self.starts)
        if not len(self.starts):
            raise ConfigError(
                f"data.{name}",
                f"{fields.dates[0]} to {fields.dates[-1]}",
                f"has {len(self.dates_s)} states and no {self.window} consecutive ones without a missing date "
                f"(multistep_input={multistep_input} + rollout={rollout})",
                fix=f"widen data.{name}.start and data.{name}.end, or shorten the rollout",
            )

    @property
    def window(self) -> int:
        """States in one sample."""
        return self.multistep_input + self.rollout

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        """Read one sample: a :class:`Batch` without its batch axis, in one slice of the dataset."""
        start = int(self.starts[index])
        # One slice: with zarr each access reads and decompresses whole chunks.
        states = np.asarray(self.fields[start : start + self.window])
        # Rearranged here, in the data worker, where it costs the training thread nothing.
        fields = np.ascontiguousarray(states.transpose(0, 2, 3, 1), dtype=np.float32)
        return Batch(torch.from_numpy(fields), torch.tensor(self.dates_s[start + self.multistep_input - 1]))

    def read(self, index: int, *, step: int) -> Batch:
        """Read one sample; every optimizer step gets the same window."""
        return self[index]

    def spec(self) -> DataSpec:
        """Return the description for model and loss, which is the same for every split of one configuration."""
        return self._spec

    @cached_property
    def _spec(self) -> DataSpec:
        mean, stdev = normalisation(self.fields)
        return DataSpec(
            variables=tuple(self.fields.variables),
            forcing=self.forcing,
            latitudes=np.asarray(self.fields.latitudes, dtype=np.float64),
            longitudes=np.asarray(self.fields.longitudes, dtype=np.float64),
            field_shape=tuple(int(size) for size in self.fields.field_shape),
            mean=mean,
            stdev=stdev,
            tendency_stdev=tendency_stdev(self.train, fallback=stdev),
            multistep_input=self.multistep_input,
            frequency_s=self.frequency_s,
        )


def _check_fields(fields: Fields, forcing: tuple[str, ...]) -> None:
    # Here and not in the configuration's checks: only the dataset knows its variables.
    for name in forcing:
        if name not in fields.variables:
            raise ConfigError("data.forcing", name, "is not a variable of the dataset", valid=fields.variables)
    if set(forcing) >= set(fields.variables):
        raise ConfigError("data.forcing", list(forcing), "must leave at least one variable to forecast")
