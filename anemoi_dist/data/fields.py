"""Interface of a dataset, and functions of it: usable windows, statistics, evenly spaced samples."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Protocol

import numpy as np

from anemoi_dist.config.schema import SplitConfig
from anemoi_dist.errors import ConfigError

DAY_S = 86400
#: Pairs of states read to estimate the standard deviation of the tendency if the dataset does not record it. Every
#: rank reads them at start-up, and 256 determine it to a few percent.
MAX_TENDENCY_PAIRS = 256


class Fields(Protocol):
    """The part of an anemoi dataset's interface that is used; ``data/synthetic.py`` implements it too."""

    @property
    def dates(self) -> np.ndarray:
        """datetime64, shape (time,)."""

    @property
    def missing(self) -> Collection[int]:
        """Indices of dates that must not be read."""

    @property
    def variables(self) -> Sequence[str]:
        """Names along the variable axis."""

    @property
    def latitudes(self) -> np.ndarray:
        """Degrees, shape (grid,)."""

    @property
    def longitudes(self) -> np.ndarray:
        """Degrees, shape (grid,)."""

    @property
    def field_shape(self) -> tuple[int, ...]:
        """(latitude, longitude) of a regular grid."""

    @property
    def frequency(self) -> timedelta:
        """Time between two dates."""

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """``mean`` and ``stdev``, shape (variable,)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(time, variable, ensemble, grid)."""

    def __len__(self) -> int:
        """Number of dates."""

    def __getitem__(self, index: slice) -> np.ndarray:
        """Return shape (time, variable, ensemble, grid)."""

    def statistics_tendencies(self) -> dict[str, np.ndarray] | None:
        """Return the statistics of the change over one step.

        Raises
        ------
        KeyError, NotImplementedError
            The dataset records none for its frequency.
        """


def seconds(dates: np.ndarray) -> np.ndarray:
    """Return int64 seconds since 1970-01-01 UTC."""
    return np.asarray(dates).astype("datetime64[s]").astype(np.int64)


def window_starts(dates_s: np.ndarray, missing: Collection[int], *, window: int, frequency_s: int) -> np.ndarray:
    """Return the indices at which ``window`` consecutive states without gap or missing date begin.

    Parameters
    ----------
    dates_s : np.ndarray
        int64, shape (time,): seconds since 1970-01-01 UTC.
    missing : Collection[int]
        Indices of dates that must not be read.
    window : int
        States in one window.
    frequency_s : int
        Seconds between two consecutive states.
    """
    count = max(0, len(dates_s) - window + 1)
    # A missing date is in the calendar without data, a gap is skipped by the calendar; a window may hold neither.
    absent = np.zeros(len(dates_s), dtype=np.int64)
    absent[sorted(missing)] = 1
    gap = (np.diff(dates_s) != frequency_s).astype(np.int64)
    # Running sums count missing dates and gaps within each window without a loop: 40 years at 6 hours are 58 000 dates.
    absent_before = np.concatenate(([0], np.cumsum(absent)))
    gaps_before = np.concatenate(([0], np.cumsum(gap)))
    begin = np.arange(count)
    num_absent = absent_before[begin + window] - absent_before[begin]
    num_gaps = gaps_before[begin + window - 1] - gaps_before[begin]
    return begin[(num_absent == 0) & (num_gaps == 0)]


def normalisation(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, float64, shape (variable,); a constant field gets 1.

    Raises
    ------
    ConfigError
        A statistic is not finite.
    """
    mean, stdev = (np.asarray(fields.statistics[key], dtype=np.float64) for key in ("mean", "stdev"))
    for key, values in (("mean", mean), ("stdev", stdev)):
        for name, value in zip(fields.variables, values, strict=True):
            if not np.isfinite(value):
                raise ConfigError(
                    f"statistics.{key} of {name}",
                    float(value),
                    "must be finite to normalise with",
                    fix=f"data.options.drop=[{name}], or recompute the dataset's statistics",
                )
    # Relative to the mean: rounding leaves a constant field with a tiny spread, and division by it would give noise.
    return mean, np.where(stdev > 1e-10 * np.abs(mean), stdev, 1.0)


def tendency_stdev(train: Fields, *, fallback: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the change over one step, float64, shape (variable,).

    If the dataset records none for its frequency, it is estimated from evenly spaced pairs of the training split. A
    variable that never changes gets ``fallback``, since any positive scale serves.

    Raises
    ------
    ConfigError
        The training split holds no two consecutive states.
    """
    try:
        recorded = train.statistics_tendencies()
    except (KeyError, NotImplementedError):
        recorded = None
    stdev = _estimated(train) if recorded is None else np.asarray(recorded["stdev"], dtype=np.float64)
    return np.where(np.isfinite(stdev) & (stdev > 1e-10 * fallback), stdev, fallback)


def _estimated(train: Fields) -> np.ndarray:
    frequency_s = round(train.frequency.total_seconds())
    starts = window_starts(seconds(train.dates), train.missing, window=2, frequency_s=frequency_s)
    if not len(starts):
        raise ConfigError(
            "data.train",
            f"{train.dates[0]} to {train.dates[-1]}",
            "must hold two consecutive states to measure the tendency",
            fix="widen data.train",
        )
    picked = starts[evenly_spaced(len(starts), at_most=MAX_TENDENCY_PAIRS, frequency_s=frequency_s)]
    total, squares = 0.0, 0.0
    for start in picked:
        # float64: the difference of two pressures of 100 000 Pa loses three digits.
        pair = np.asarray(train[int(start) : int(start) + 2], dtype=np.float64)
        change = (pair[1] - pair[0]).reshape(pair.shape[1], -1)
        total, squares = total + change.mean(1), squares + np.square(change).mean(1)
    mean = total / len(picked)
    # Rounding may leave a variance of a constant field just below zero.
    return np.sqrt(np.maximum(squares / len(picked) - np.square(mean), 0.0))


def times_of_day(frequency_s: int) -> int:
    """Return the number of distinct times of day that the states have."""
    return DAY_S // math.gcd(DAY_S, frequency_s)


def evenly_spaced(count: int, *, at_most: int | None, frequency_s: int | None = None) -> np.ndarray:
    """Return at most ``at_most`` indices below ``count`` (None: all), evenly spaced and over all times of day.

    The spacing shares no factor with the number of states in a day: otherwise only some times of day would be sampled,
    and the daily cycle would look like a trend.
    """
    day = 1 if frequency_s is None else times_of_day(frequency_s)
    stride = 1 if at_most is None else -(-count // at_most)
    while math.gcd(stride, day) != 1:
        stride += 1
    return np.arange(0, count, stride)


def empty_split(split: SplitConfig, *, name: str, dates: np.ndarray) -> ConfigError:
    """Return the error for a split without a single date."""
    return ConfigError(
        f"data.{name}",
        f"{split.start} to {split.end}",
        f"must hold dates of the dataset, which has {dates[0]} to {dates[-1]}",
        fix=f"set data.{name}.start and data.{name}.end within that range",
    )
