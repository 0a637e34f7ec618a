"""A forecast as an xarray dataset in the Climate and Forecast conventions (CF-1.10)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anemoi_dist import __version__
from anemoi_dist.data.batch import DataSpec

if TYPE_CHECKING:
    import xarray

#: CF's standard names of ECMWF's short names.
_STANDARD_NAMES = {
    "msl": "air_pressure_at_mean_sea_level",
    "sp": "surface_air_pressure",
    "2t": "air_temperature",
    "2d": "dew_point_temperature",
    "10u": "eastward_wind",
    "10v": "northward_wind",
    "skt": "surface_temperature",
    "sst": "sea_surface_temperature",
    "tcw": "atmosphere_mass_content_of_water",
    "q": "specific_humidity",
    "t": "air_temperature",
    "u": "eastward_wind",
    "v": "northward_wind",
    "w": "lagrangian_tendency_of_air_pressure",
    "z": "geopotential",
}


def to_xarray(
    forecast: np.ndarray, *, spec: DataSpec, start: np.datetime64, units: Mapping[str, str], source: str
) -> xarray.Dataset:
    """Return a forecast with names, units and coordinates.

    Parameters
    ----------
    forecast : np.ndarray
        float32, physical units, shape (step, ensemble, grid, prognostic variable).
    spec : DataSpec
        Variables and grid.
    start : np.datetime64
        Valid time of the last input state.
    units : Mapping[str, str]
        Name of a variable -> its units, where they are known.
    source : str
        What has made it.

    Returns
    -------
    xarray.Dataset
        Dimensions ``time`` (valid time), ``realization`` if there are several members, and ``latitude`` and
        ``longitude`` of a regular grid, else ``cell`` with both as coordinates of it. ``forecast_reference_time`` and
        ``forecast_period`` say when each field was forecast.
    """
    import xarray

    grid, coordinates = _grid(spec)
    values = forecast.reshape(*forecast.shape[:2], *(len(coordinates[name][1]) for name in grid), forecast.shape[-1])
    dimensions = ("time", "realization", *grid)
    if forecast.shape[1] == 1:
        values, dimensions = values[:, 0], ("time", *grid)
    else:
        coordinates["realization"] = (("realization",), np.arange(forecast.shape[1]), _named("realization", units="1"))
    periods = np.arange(1, len(forecast) + 1) * np.timedelta64(spec.frequency_s, "s")
    reference = start.astype("datetime64[ns]")
    coordinates["time"] = (("time",), reference + periods, _named("time"))
    coordinates["forecast_reference_time"] = ((), reference, _named("forecast_reference_time"))
    hours = periods / np.timedelta64(3600, "s")
    coordinates["forecast_period"] = (("time",), hours, _named("forecast_period", units="hours"))
    variables = {
        name: (dimensions, values[..., number], _attributes(name, units.get(name)))
        for number, name in enumerate(spec.prognostic)
    }
    about = {"Conventions": "CF-1.10", "title": "Forecast", "source": f"anemoi-dist {__version__}, {source}"}
    return xarray.Dataset(variables, coordinates, about)


def write_netcdf(dataset: xarray.Dataset, path: Path) -> None:
    """Write the result of :func:`to_xarray`, compressed."""
    encoding: dict[Any, dict[str, object]] = {name: {"zlib": True, "complevel": 1} for name in dataset.data_vars}
    encoding |= {name: {"_FillValue": None} for name in dataset.coords}  # CF: a coordinate has no gaps
    for name in ("time", "forecast_reference_time"):
        encoding[name] |= {"units": "hours since 1970-01-01", "dtype": "float64"}
    dataset.to_netcdf(path, encoding=encoding)


def _grid(spec: DataSpec) -> tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]:
    """Return the dimensions of the grid and its coordinates."""
    latitude, longitude = _named("latitude", units="degrees_north"), _named("longitude", units="degrees_east")
    if len(spec.field_shape) == 2:
        latitudes, longitudes = (values.reshape(spec.field_shape) for values in (spec.latitudes, spec.longitudes))
        # A curved grid has two dimensions, too, and no latitude of a row.
        if (latitudes == latitudes[:, :1]).all() and (longitudes == longitudes[:1]).all():
            coordinates = {
                "latitude": (("latitude",), latitudes[:, 0], latitude),
                "longitude": (("longitude",), longitudes[0], longitude),
            }
            return ("latitude", "longitude"), coordinates
    cells = {"latitude": (("cell",), spec.latitudes, latitude), "longitude": (("cell",), spec.longitudes, longitude)}
    return ("cell",), cells | {"cell": (("cell",), np.arange(len(spec.latitudes)), {"long_name": "grid point"})}


def _named(standard_name: str, *, units: str | None = None) -> dict[str, str]:
    return {"standard_name": standard_name} | ({"units": units} if units else {})


def _attributes(name: str, units: str | None) -> dict[str, str]:
    """Return the attributes of a variable such as ``msl`` or ``t_850``."""
    short, level = name, ""
    if match := re.fullmatch(r"(\w+)_(\d+)", name):
        short, level = match[1], f" at level {match[2]}"
    attributes = {"long_name": f"{short}{level}", "coordinates": "forecast_reference_time forecast_period"}
    if short in _STANDARD_NAMES:
        attributes["standard_name"] = _STANDARD_NAMES[short]
    if units and units != "dimensionless":
        attributes["units"] = units
    return attributes
