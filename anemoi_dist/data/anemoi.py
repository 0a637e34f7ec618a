"""Samples from an anemoi dataset: a few consecutive states each, with no missing date among them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from anemoi_dist.config import DataConfig, SplitConfig
from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.errors import ConfigError

SAMPLE_PREFIX = "sample:"
SAMPLE_DIRECTORY = Path(__file__).parent / "sample"
SPLITS = ("train", "validation", "test")
KINDS = ("anemoi", "synthetic")
#: Pairs of states read to estimate the spread of the tendency, where the dataset does not record it.
MAX_TENDENCY_PAIRS = 256


class Fields(Protocol):
    """What is used of an anemoi dataset; ``data/synthetic.py`` has the same face."""

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
        """Between two dates."""

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
        """Return the statistics of the change over one step, or raise KeyError."""


class WeatherDataset(Dataset):
    """Windows of ``multistep_input + rollout`` consecutive states of one block of dates.

    A window that touches a missing date or a gap in time is left out and counted, never read.

    Parameters
    ----------
    fields : Fields
        The block that samples come from.
    train : Fields
        The training block, for statistics: normalisation must not see the other blocks.
    forcing : tuple[str, ...]
        Variables that are given, not forecast.
    multistep_input, rollout : int
        Past states and forecast steps of one sample.
    name : str
        Name of the block, for messages.

    Attributes
    ----------
    num_dropped : int
        Windows left out for a missing date or a gap.

    Raises
    ------
    ConfigError
        The block holds no window, or a forcing variable is unknown.
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
        self.dates_s = _seconds(fields.dates)
        self.frequency_s = round(fields.frequency.total_seconds())
        self.starts = _window_starts(self.dates_s, fields.missing, window=self.window, frequency_s=self.frequency_s)
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
        states = np.asarray(self.fields[start : start + self.window])
        fields = np.ascontiguousarray(states.transpose(0, 2, 3, 1), dtype=np.float32)
        return Batch(torch.from_numpy(fields), torch.tensor(self.last_input_dates_s[index], dtype=torch.int64))

    @property
    def last_input_dates_s(self) -> np.ndarray:
        """int64, shape (sample,): date of each sample's last input state, in seconds since 1970-01-01 UTC."""
        return self.dates_s[self.starts + self.multistep_input - 1]

    def spec(self) -> DataSpec:
        """Return what a model and a loss need to know; the same for every split of one configuration."""
        return self._spec

    @cached_property
    def _spec(self) -> DataSpec:
        mean, stdev = _statistics(self.fields)
        return DataSpec(
            variables=tuple(self.fields.variables),
            forcing=self.forcing,
            latitudes=np.asarray(self.fields.latitudes, dtype=np.float64),
            longitudes=np.asarray(self.fields.longitudes, dtype=np.float64),
            field_shape=tuple(int(size) for size in self.fields.field_shape),
            mean=mean,
            stdev=stdev,
            tendency_stdev=_tendency_stdev(self.train, fallback=stdev),
            multistep_input=self.multistep_input,
            frequency_s=self.frequency_s,
        )


def open_split(data: DataConfig, split: str, *, rollout: int) -> WeatherDataset:
    """Open one block of the configured dataset.

    Parameters
    ----------
    data : DataConfig
        What is read.
    split : str
        ``train``, ``validation`` or ``test``.
    rollout : int
        Forecast steps that each sample must hold the truth of.

    Raises
    ------
    ConfigError
        The dataset can't be opened, a name is unknown, or the block is too short.
    """
    if split not in SPLITS:
        raise ConfigError("split", split, "is not a block of the dataset", valid=SPLITS)
    train: Fields
    block: Fields
    if data.kind == "anemoi":
        whole = open_anemoi(data.dataset, **data.options)
        train, block = (_between(whole, getattr(data, name), name=name) for name in ("train", split))
    elif data.kind == "synthetic":
        from anemoi_dist.data.synthetic import SyntheticFields

        synthetic = SyntheticFields.from_config(data)
        train, block = (synthetic.between(getattr(data, name), name=name) for name in ("train", split))
    else:
        raise ConfigError("data.kind", data.kind, "is not a kind of dataset", valid=KINDS)
    return WeatherDataset(
        block,
        train=train,
        forcing=tuple(data.forcing),
        multistep_input=data.multistep_input,
        rollout=rollout,
        name=split,
    )


def open_anemoi(dataset: Any, **options: Any) -> Fields:
    """Open an anemoi dataset with any option of ``anemoi.datasets.open_dataset``.

    Parameters
    ----------
    dataset : str, list or dict
        Path, name, list or dictionary as ``open_dataset`` takes it; ``sample:NAME`` is a dataset that ships with
        this package.
    **options : Any
        ``select``, ``frequency``, ``start``, ``join``, ...

    Raises
    ------
    ConfigError
        Nothing can be opened like that; the message carries the reason and, where a variable is unknown, the names.
    """
    if dataset is None or dataset in ("", [], {}):
        raise ConfigError("data.dataset", dataset, "must name a dataset", fix="data.dataset=/path/to/dataset.zarr")
    if options.get("skip_missing_dates"):
        raise ConfigError(
            "data.options.skip_missing_dates",
            options["skip_missing_dates"],
            "must not be given: samples that touch a missing date are left out anyway",
            fix="take it out of data.options",
        )
    resolved = _resolve_samples(dataset)
    try:
        fields = _open(resolved, **options)
    except _OPEN_ERRORS as error:
        raise _explain(resolved, dataset, options, error) from error
    if len(fields.shape) != 4:
        raise ConfigError(
            "data.dataset", dataset, f"must be (time, variable, ensemble, grid), but its shape is {fields.shape}"
        )
    return fields


# What anemoi-datasets raises for a wrong path, name, option or value; anything else is not the user's doing.
_OPEN_ERRORS = (ValueError, NotImplementedError, AssertionError, KeyError, TypeError, FileNotFoundError)


def _open(*args: Any, **options: Any) -> Any:
    from anemoi.datasets import open_dataset

    with _no_lasting_process():
        return open_dataset(*args, **options)


@contextlib.contextmanager
def _no_lasting_process() -> Iterator[None]:
    """Keep anemoi-datasets from leaving a process behind.

    It hands its usage analytics (off unless the user asked for them) to a process pool that it forks when the first
    dataset is opened. That child would hold the rank's sockets and outlive a killed rank. A thread does the same work
    and is gone afterwards.
    """
    try:
        analytics: Any = importlib.import_module("anemoi.datasets.usage.analytics")
        pool = analytics._executor
    except (ModuleNotFoundError, AttributeError):  # versions without it
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        analytics._executor = thread
        try:
            yield
        finally:
            analytics._executor = pool


def _resolve_samples(dataset: Any) -> Any:
    """Replace ``sample:NAME`` by its path, anywhere in a nested description."""
    if isinstance(dataset, dict):
        return {key: _resolve_samples(value) for key, value in dataset.items()}
    if isinstance(dataset, list | tuple):
        return [_resolve_samples(value) for value in dataset]
    if not isinstance(dataset, str) or not dataset.startswith(SAMPLE_PREFIX):
        return dataset
    path = SAMPLE_DIRECTORY / f"{dataset.removeprefix(SAMPLE_PREFIX)}.zarr"
    known = sorted(f"{SAMPLE_PREFIX}{entry.stem}" for entry in SAMPLE_DIRECTORY.glob("*.zarr"))
    if dataset not in known:
        raise ConfigError("data.dataset", dataset, "is not a dataset that ships with the package", valid=known)
    return str(path)


def _explain(resolved: Any, dataset: Any, options: dict[str, Any], error: Exception) -> ConfigError:
    """Say whether the dataset or its options are at fault."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not options:
        fix = "give the path of a .zarr directory that exists, or a name that anemoi-datasets knows"
        return ConfigError("data.dataset", dataset, f"cannot be opened: {reason}", fix=fix)
    try:
        variables = _open(resolved).variables
    except _OPEN_ERRORS as plain_error:
        return _explain(resolved, dataset, {}, plain_error)
    for key in ("select", "drop"):
        names = options.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if name not in variables:
                return ConfigError(f"data.options.{key}", name, "is not a variable of the dataset", valid=variables)
    return ConfigError("data.options", options, f"cannot be applied to the dataset: {reason}")


def _between(fields: Any, split: SplitConfig, *, name: str) -> Fields:
    if split.start is None and split.end is None:
        return fields
    try:
        block = _open(fields, start=split.start, end=split.end)
        size = len(block)
    except _OPEN_ERRORS as error:
        raise ConfigError(
            f"data.{name}",
            f"{split.start} to {split.end}",
            f"is not a block of dates: {error}",
            fix="give dates such as 2020, 2020-01, 2020-01-31 or 2020-01-31T18:00:00",
        ) from error
    if not size:
        raise empty_block(split, name=name, dates=fields.dates)
    return block


def empty_block(split: SplitConfig, *, name: str, dates: np.ndarray) -> ConfigError:
    """Return the error for a block without a single date."""
    return ConfigError(
        f"data.{name}",
        f"{split.start} to {split.end}",
        f"must hold dates of the dataset, which has {dates[0]} to {dates[-1]}",
        fix=f"set data.{name}.start and data.{name}.end within that range",
    )


def _check_fields(fields: Fields, forcing: tuple[str, ...]) -> None:
    for name in forcing:
        if name not in fields.variables:
            raise ConfigError("data.forcing", name, "is not a variable of the dataset", valid=fields.variables)
    if set(forcing) >= set(fields.variables):
        raise ConfigError("data.forcing", list(forcing), "must leave at least one variable to forecast")


def _seconds(dates: np.ndarray) -> np.ndarray:
    return np.asarray(dates).astype("datetime64[s]").astype(np.int64)


def _window_starts(dates_s: np.ndarray, missing: Collection[int], *, window: int, frequency_s: int) -> np.ndarray:
    """Return every index at which ``window`` consecutive, existing states begin."""
    count = max(0, len(dates_s) - window + 1)
    absent = np.zeros(len(dates_s), dtype=np.int64)
    absent[sorted(missing)] = 1
    gap = (np.diff(dates_s) != frequency_s).astype(np.int64)
    # Running sums give the number of missing dates and gaps within each window without a loop over dates.
    absent_before = np.concatenate(([0], np.cumsum(absent)))
    gaps_before = np.concatenate(([0], np.cumsum(gap)))
    begin = np.arange(count)
    num_absent = absent_before[begin + window] - absent_before[begin]
    num_gaps = gaps_before[begin + window - 1] - gaps_before[begin]
    return begin[(num_absent == 0) & (num_gaps == 0)]


def _statistics(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, float64, shape (variable,); a constant field gets 1."""
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
    return mean, np.where(stdev > 1e-10 * np.abs(mean), stdev, 1.0)


def _tendency_stdev(train: Fields, *, fallback: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the change over one step, float64, shape (variable,).

    The dataset's own where it records one for its frequency, else from evenly spaced pairs of the training block. A
    variable that never changes gets ``fallback``: any positive scale serves.
    """
    try:
        recorded = train.statistics_tendencies()
    except (KeyError, NotImplementedError):
        recorded = None
    stdev = _estimate_tendency_stdev(train) if recorded is None else np.asarray(recorded["stdev"], dtype=np.float64)
    return np.where(np.isfinite(stdev) & (stdev > 1e-10 * fallback), stdev, fallback)


def _estimate_tendency_stdev(train: Fields) -> np.ndarray:
    starts = _window_starts(
        _seconds(train.dates), train.missing, window=2, frequency_s=round(train.frequency.total_seconds())
    )
    if not len(starts):
        raise ConfigError(
            "data.train",
            f"{train.dates[0]} to {train.dates[-1]}",
            "must hold two consecutive states to measure the tendency",
            fix="widen data.train",
        )
    picked = starts[evenly_spaced(len(starts), at_most=MAX_TENDENCY_PAIRS, day=steps_per_day(train.frequency))]
    total, squares = 0.0, 0.0
    for start in picked:
        pair = np.asarray(train[int(start) : int(start) + 2], dtype=np.float64)
        change = (pair[1] - pair[0]).reshape(pair.shape[1], -1)
        total, squares = total + change.mean(1), squares + np.square(change).mean(1)
    mean = total / len(picked)
    return np.sqrt(np.maximum(squares / len(picked) - np.square(mean), 0.0))


def steps_per_day(frequency: timedelta) -> int:
    """Return the number of states in a day, at least 1."""
    return max(1, round(timedelta(days=1) / frequency))


def evenly_spaced(count: int, *, at_most: int | None, day: int) -> np.ndarray:
    """Return at most ``at_most`` indices below ``count``, evenly spaced and over all times of day.

    The spacing shares no factor with the ``day`` states of a day: one that did would see only some times of day, and
    the tide would look like a trend.
    """
    stride = 1 if at_most is None else -(-count // at_most)
    while np.gcd(stride, day) != 1:
        stride += 1
    return np.arange(0, count, stride)
