"""Expand overrides with sweeps in them to the overrides of each run, in Hydra's grammar. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from anemoi_dist.config.overrides import THEIRS
from anemoi_dist.errors import ConfigError

#: More than this at once is a typing error, which a queue would not forgive.
MAX_RUNS = 1000


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return one list of overrides a run: every combination of the values that are swept.

    Parameters
    ----------
    overrides : Sequence[str]
        ``key=a,b``, ``key=choice(a,b)`` and ``key=range(1,4)`` are sweeps; the rest goes to every run.

    Raises
    ------
    ConfigError
        Nothing is swept, a sweep has no finite list of values, or there are more than :data:`MAX_RUNS` runs.
    """
    parser = OverridesParser.create()
    axes: list[list[str]] = []
    for text in overrides:
        if text == THEIRS or text.startswith(f"{THEIRS}=["):  # what stands after it is swept as any other
            axes.append([text])
            continue
        try:
            override = parser.parse_override(text)
            values = [text]
            if override.is_sweep_override():
                if not override.is_discrete_sweep() or override.is_hydra_override():
                    raise HydraException("its values cannot be listed")
                key = text.partition("=")[0]
                values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        except HydraException as error:
            reason = str(error).strip().splitlines()[0]
            fix = "key=a,b, key=choice(a,b) or key=range(start,stop,step)"
            raise ConfigError("argument", text, f"cannot be swept: {reason}", fix=fix) from error
        axes.append(values)
    if all(len(values) == 1 for values in axes):
        raise ConfigError(
            "--multirun", "", "sweeps nothing: no key has several values", fix="training.lr.rate=1e-4,3e-4"
        )
    num_runs = 1
    for values in axes:
        num_runs *= len(values)
    if num_runs > MAX_RUNS:
        raise ConfigError("--multirun", num_runs, f"is more than {MAX_RUNS} runs", fix="sweep fewer values at once")
    return [list(run) for run in itertools.product(*axes)]
