"""Open the configured dataset: an anemoi dataset, the sample shipped with the package, or synthetic fields."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anemoi_dist.config.schema import DataConfig, SplitConfig
from anemoi_dist.data.dataset import WeatherDataset
from anemoi_dist.data.fields import Fields, empty_split
from anemoi_dist.errors import ConfigError

SAMPLE_PREFIX = "sample:"
SAMPLE_DIRECTORY = Path(__file__).parent / "sample"
SPLITS = ("train", "validation", "test")
KINDS = ("anemoi", "synthetic")


def open_split(data: DataConfig, split: str, *, rollout: int) -> WeatherDataset:
    """Open one split of the configured dataset.

    Parameters
    ----------
    data : DataConfig
        Dataset, options, and the dates of each split.
    split : str
        ``train``, ``validation`` or ``test``.
    rollout : int
        Forecast steps, for each of which a sample holds the true state.

    Raises
    ------
    ConfigError
        The dataset cannot be opened, a name is unknown, or the split is too short.
    """
    if split not in SPLITS:
        raise ConfigError("split", split, "is not a split of the dataset", valid=SPLITS)
    # The training split with the one asked for: statistics must come from the same dates for all of them.
    whole = open_fields(data)
    train, fields = (_between(whole, getattr(data, name), name=name) for name in ("train", split))
    return WeatherDataset(
        fields,
        train=train,
        forcing=tuple(data.forcing),
        multistep_input=data.multistep_input,
        rollout=rollout,
        name=split,
    )


def open_fields(data: DataConfig) -> Fields:
    """Open the configured dataset, all dates of it.

    Raises
    ------
    ConfigError
        It cannot be opened, or ``data.kind`` is unknown.
    """
    if data.kind == "anemoi":
        return open_anemoi(data.dataset, **data.options)
    if data.kind == "synthetic":
        from anemoi_dist.data.synthetic import SyntheticFields

        return SyntheticFields.from_config(data)
    raise ConfigError("data.kind", data.kind, "is not a kind of dataset", valid=KINDS)


def open_anemoi(dataset: Any, **options: Any) -> Fields:
    """Open an anemoi dataset with any option of ``anemoi.datasets.open_dataset``.

    Parameters
    ----------
    dataset : str, list or dict
        Path, name, list or dictionary as ``open_dataset`` takes it; ``sample:NAME`` is a dataset shipped with this
        package.
    **options : Any
        ``select``, ``frequency``, ``start``, ``join``, ...

    Raises
    ------
    ConfigError
        The dataset cannot be opened; the message gives the reason and, for an unknown variable, the valid names.
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
    # ``open_dataset`` can also return other shapes, such as several datasets zipped.
    if len(fields.shape) != 4:
        raise ConfigError(
            "data.dataset", dataset, f"must be (time, variable, ensemble, grid), but its shape is {fields.shape}"
        )
    return fields


# Exceptions of anemoi-datasets for a wrong path, name, option or value; any other is a defect and keeps its traceback.
_OPEN_ERRORS = (ValueError, NotImplementedError, AssertionError, KeyError, TypeError, FileNotFoundError)


def _open(*args: Any, **options: Any) -> Any:
    # Imported here: it takes up to half a second, and synthetic data do without it.
    from anemoi.datasets import open_dataset

    keep_in_process()
    return open_dataset(*args, **options)


class _InProcess:
    """An executor that does the work at once."""

    def submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Do the work."""
        work(*args, **kwargs)


def keep_in_process() -> None:
    """Keep anemoi-datasets from leaving a child process behind.

    It submits its usage analytics (off by default) to a process pool, which it forks when the first dataset is opened.
    That child would hold the rank's sockets and outlive a killed rank.
    """
    # Other versions of anemoi-datasets have no analytics.
    with contextlib.suppress(ModuleNotFoundError):
        analytics: Any = importlib.import_module("anemoi.datasets.usage.analytics")
        analytics._executor = _InProcess()


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
    """Return the error that names what is at fault: the dataset, or one of its options."""
    # The first line alone: the reason stands inside another message.
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not options:
        fix = "give the path of a .zarr directory that exists, or a name that anemoi-datasets knows"
        return ConfigError("data.dataset", dataset, f"cannot be opened: {reason}", fix=fix)
    # Opened once more without options: if that works, the options are at fault, and the variables are known.
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
    if hasattr(fields, "between"):
        part: Fields = fields.between(split, name=name)
        return part
    if split.start is None and split.end is None:
        return fields
    # Both dates are inclusive to their own precision, as in anemoi-datasets: an end of 2020-01 includes 31 January.
    try:
        part = _open(fields, start=split.start, end=split.end)
        size = len(part)
    except _OPEN_ERRORS as error:
        raise ConfigError(
            f"data.{name}",
            f"{split.start} to {split.end}",
            f"is not a range of dates: {error}",
            fix="give dates such as 2020, 2020-01, 2020-01-31 or 2020-01-31T18:00:00",
        ) from error
    if not size:
        raise empty_split(split, name=name, dates=fields.dates)
    return part
