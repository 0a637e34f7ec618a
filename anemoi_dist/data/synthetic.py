"""Travelling waves computed on demand: data of any size for tests of scale, without files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta

import numpy as np

from anemoi_dist.config.schema import DataConfig, SplitConfig
from anemoi_dist.data.fields import empty_split
from anemoi_dist.errors import ConfigError

NUM_WAVES = 4


@dataclass(frozen=True)
class SyntheticSettings:
    """Settings in ``data.dataset`` of synthetic data: grid, names, and dates."""

    field_shape: Sequence[int] = (32, 64)
    variables: Sequence[str] = ("wave_0", "wave_1")
    num_dates: int = 1024
    start: str = "2000-01-01"
    frequency_s: int = 21600


@dataclass(frozen=True)
class SyntheticFields:
    """Deterministic fields on a regular grid that implement :class:`~anemoi_dist.data.fields.Fields`.

    Each variable is a sum of waves ``a g(latitude) cos(m longitude - w t + p)``, determined by the index of the
    variable and independent of the grid, so that the same weather exists at any resolution.

    Parameters
    ----------
    field_shape : tuple[int, int]
        Latitudes (from pole to pole) and longitudes.
    variables : list[str]
        Names of the variables.
    dates : np.ndarray
        datetime64[s], shape (time,).
    frequency : timedelta
        Time between two dates.
    epoch_s : int
        Unix seconds at which the waves have their initial phase.
    """

    field_shape: tuple[int, int]
    variables: list[str]
    dates: np.ndarray
    frequency: timedelta
    epoch_s: int
    missing: frozenset[int] = frozenset()

    @classmethod
    def from_config(cls, data: DataConfig) -> SyntheticFields:
        """Build from ``data.dataset``: a mapping with any of :class:`SyntheticSettings`.

        Raises
        ------
        ConfigError
            A setting is unknown or has a wrong value.
        """
        valid = [field.name for field in fields(SyntheticSettings)]
        given = data.dataset or {}
        if not isinstance(given, dict):
            raise ConfigError("data.dataset", given, "must be a mapping for data.kind=synthetic", valid=valid)
        for key in given:
            if key not in valid:
                raise ConfigError("data.dataset", key, "is not a setting of synthetic data", valid=valid)
        if data.options:
            raise ConfigError("data.options", data.options, "has no effect on synthetic data", fix="data.options={}")
        settings = SyntheticSettings(**given)
        shape = tuple(settings.field_shape)
        if len(shape) != 2 or min(shape) < 2:
            raise ConfigError("data.dataset.field_shape", shape, "must be [latitudes, longitudes], 2 at least each")
        for key in ("num_dates", "frequency_s"):
            if getattr(settings, key) < 1:
                raise ConfigError(f"data.dataset.{key}", getattr(settings, key), "must be at least 1")
        # In YAML a bare year is a number.
        start = _date(str(settings.start), key="data.dataset.start").astype("datetime64[s]")
        dates = start + np.arange(settings.num_dates) * np.timedelta64(settings.frequency_s, "s")
        frequency = timedelta(seconds=settings.frequency_s)
        # The epoch is kept apart from the dates: a split must give the same weather as the whole.
        return cls(shape, list(settings.variables), dates, frequency, int(start.astype(np.int64)))

    def between(self, split: SplitConfig, *, name: str) -> SyntheticFields:
        """Return the dates from ``split.start`` to ``split.end``, both inclusive to their own precision.

        Raises
        ------
        ConfigError
            A date is malformed, or there are no dates between the two.
        """
        keep = np.ones(len(self.dates), dtype=bool)
        if split.start is not None:
            keep &= self.dates >= _date(split.start, key=f"data.{name}.start")
        if split.end is not None:
            # One unit of the given precision: 2000-01 + 1 is 2000-02, so all of January is included.
            keep &= self.dates < _date(split.end, key=f"data.{name}.end") + 1
        if not keep.any():
            raise empty_split(split, name=name, dates=self.dates)
        return replace(self, dates=self.dates[keep])

    def __len__(self) -> int:
        return len(self.dates)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (time, variable, ensemble, grid)."""
        return (len(self.dates), len(self.variables), 1, math.prod(self.field_shape))

    @property
    def latitudes(self) -> np.ndarray:
        """Latitudes in degrees, north first, float64, shape (grid,)."""
        return np.repeat(np.linspace(90.0, -90.0, self.field_shape[0]), self.field_shape[1])

    @property
    def longitudes(self) -> np.ndarray:
        """Longitudes in degrees east, float64, shape (grid,)."""
        return np.tile(np.arange(self.field_shape[1]) * 360.0 / self.field_shape[1], self.field_shape[0])

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """Mean and standard deviation over all time, in closed form, shape (variable,)."""
        waves = [_waves(index) for index in range(len(self.variables))]
        variance = [np.sum(_profiles(w, self.field_shape[0]) ** 2, axis=1).mean() / 2 for w in waves]
        return {"mean": np.array([w.offset for w in waves]), "stdev": np.sqrt(variance)}

    def statistics_tendencies(self) -> dict[str, np.ndarray]:
        """Mean and standard deviation of the change over one step, over all time, shape (variable,)."""
        variance = []
        for index in range(len(self.variables)):
            waves = _waves(index)
            gain = 2 * np.sin(waves.frequency_hz * np.pi * self.frequency.total_seconds())
            variance.append(np.sum((_profiles(waves, self.field_shape[0]) * gain) ** 2, axis=1).mean() / 2)
        return {"mean": np.zeros(len(variance)), "stdev": np.sqrt(variance)}

    def __getitem__(self, index: slice) -> np.ndarray:
        """Compute float32 fields, shape (time, variable, ensemble, grid)."""
        times_s = self.dates[index].astype("datetime64[s]").astype(np.int64) - self.epoch_s
        num_latitudes, num_longitudes = self.field_shape
        longitudes = np.arange(num_longitudes) * 2 * np.pi / num_longitudes
        states = np.empty((len(times_s), len(self.variables), 1, math.prod(self.field_shape)), dtype=np.float32)
        for variable in range(len(self.variables)):
            waves = _waves(variable)
            profiles = _profiles(waves, num_latitudes)
            for step, time_s in enumerate(times_s):
                phase = waves.phase - 2 * np.pi * waves.frequency_hz * time_s
                along = np.cos(waves.zonal[:, None] * longitudes + phase[:, None])
                states[step, variable, 0] = (waves.offset + profiles @ along).ravel()
        return states


def _date(text: str, *, key: str) -> np.datetime64:
    try:
        return np.datetime64(text)
    except ValueError as error:
        raise ConfigError(key, text, "must be a date such as 2000-01-31", fix=f"{key}=2000-01-31") from error


@dataclass(frozen=True)
class _Waves:
    offset: float
    amplitude: np.ndarray
    zonal: np.ndarray
    meridional: np.ndarray
    phase: np.ndarray
    frequency_hz: np.ndarray


def _waves(variable: int) -> _Waves:
    # The legacy generator, because its stream is frozen: newer ones may change between versions of numpy.
    random = np.random.RandomState(variable)
    return _Waves(
        offset=100.0 * (variable + 1),
        amplitude=random.uniform(2.0, 8.0, NUM_WAVES),
        zonal=np.arange(1, NUM_WAVES + 1),
        meridional=random.randint(0, 4, NUM_WAVES),
        phase=random.uniform(0, 2 * np.pi, NUM_WAVES),
        # Eastward by one wavelength in 2 to 8 days, like weather systems.
        frequency_hz=1 / (86400 * random.uniform(2.0, 8.0, NUM_WAVES)),
    )


def _profiles(waves: _Waves, num_latitudes: int) -> np.ndarray:
    """Return the waves' amplitudes, shape (latitude, wave): 0 at the poles, where longitude has no meaning."""
    latitudes = np.deg2rad(np.linspace(90.0, -90.0, num_latitudes))[:, None]
    return waves.amplitude * np.cos(latitudes) * np.cos(waves.meridional * latitudes)
