"""The states that a forecast begins from, and the forcings of the dates that it reaches."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from anemoi_dist.data.batch import DataSpec
from anemoi_dist.data.fields import Fields, seconds
from anemoi_dist.errors import ConfigError


def initial_states(fields: Fields, spec: DataSpec, *, start_s: int, num_steps: int) -> np.ndarray:
    """Return the input states of a forecast and, for the states after them, the forcings.

    Parameters
    ----------
    fields : Fields
        The whole dataset. It need not reach the end of the forecast: forcings of later dates are computed.
    spec : DataSpec
        Variables and grid.
    start_s : int
        Valid time of the last input state, in seconds since 1970-01-01 UTC.
    num_steps : int
        Forecast steps.

    Returns
    -------
    np.ndarray
        float32, physical units, shape (1, multistep_input + num_steps - 1, ensemble, grid, variable); NaN where a
        prognostic variable is to be forecast.

    Raises
    ------
    ConfigError
        An input state is not in the dataset, or a forcing of a later date can be neither read nor computed.
    """
    index = {int(date): i for i, date in enumerate(seconds(fields.dates)) if i not in fields.missing}
    first_s = start_s - (spec.multistep_input - 1) * spec.frequency_s
    dates_s = [first_s + step * spec.frequency_s for step in range(spec.multistep_input + num_steps - 1)]
    states = np.full((len(dates_s), *fields.shape[1:]), np.nan, dtype=np.float32)
    given = [spec.variables.index(name) for name in spec.forcing]
    calculator = _Calculator(fields, spec)
    for position, date_s in enumerate(dates_s):
        if position < spec.multistep_input:
            if date_s not in index:
                raise _not_in(fields, date_s, spec)
            states[position] = fields[index[date_s] : index[date_s] + 1][0]
        elif date_s in index:
            states[position, given] = fields[index[date_s] : index[date_s] + 1][0, given]
        else:
            for variable in given:
                values = calculator.field(spec.variables[variable], date_s)
                states[position, variable] = states[spec.multistep_input - 1, variable] if values is None else values
    return np.ascontiguousarray(states.transpose(0, 2, 3, 1)[None])


def _not_in(fields: Fields, date_s: int, spec: DataSpec) -> ConfigError:
    return ConfigError(
        "--start",
        str(np.datetime64(date_s, "s")),
        f"is not a date of the dataset, or is missing in it; a forecast begins from {spec.multistep_input} states, the "
        f"last of them at --start, {spec.frequency_s // 3600} h apart",
        fix=f"take one between {fields.dates[0]} and {fields.dates[-1]}",
    )


class _Calculator:
    """Forcings that follow from place and time, as anemoi-datasets computes them (earthkit-data)."""

    def __init__(self, fields: Fields, spec: DataSpec) -> None:
        self._constant = set(getattr(fields, "constant_fields", ()))
        self._latitudes, self._longitudes = spec.latitudes, spec.longitudes
        self._maker: Any = None

    def field(self, name: str, date_s: int) -> np.ndarray | None:
        """Return a forcing, shape (grid,); None for one that does not change with time.

        Raises
        ------
        ConfigError
            It is not known how to compute it.
        """
        if name in self._constant:
            return None
        if self._maker is None:
            # Imported here: it takes seconds, and a forecast within the dataset does without.
            from earthkit.data.sources.forcings import ForcingMaker

            self._maker = ForcingMaker(self)
        try:
            values: np.ndarray = getattr(self._maker, name)(datetime.fromtimestamp(date_s, UTC).replace(tzinfo=None))
        except (AttributeError, ValueError) as error:
            raise ConfigError(
                "data.forcing",
                name,
                f"is not in the dataset at {np.datetime64(date_s, 's')} and cannot be computed from place and time",
                fix="take fewer --steps, or a dataset that reaches as far",
            ) from error
        return values

    # What ForcingMaker asks of the field whose grid it uses.

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._latitudes),)

    def to_latlon(self, *, flatten: bool) -> dict[str, np.ndarray]:
        return {"lat": self._latitudes, "lon": self._longitudes}
