"""``anemoi-dist forecast``: forecast with a run's model, in this process, without the engine that trained it."""

from __future__ import annotations

import argparse

from anemoi_dist.checkpoint.export import check_out, replacing
from anemoi_dist.errors import ConfigError, ExitCode, print_message

from .arguments import locate_run


def run(options: argparse.Namespace) -> int:
    """Write the forecast and say what it holds."""
    run = locate_run(options.run, options.root)
    if options.output.suffix != ".nc":
        raise ConfigError("--output", str(options.output), "must be a netCDF file", fix="a name that ends in .nc")
    check_out(options.output, force=options.force)
    print_message("loading libraries, model and data")
    from anemoi_dist.tasks.forecast.output import write_netcdf
    from anemoi_dist.tasks.forecast.trained import load_run  # imports torch

    model = load_run(run.path, step=options.checkpoint)
    print_message(f"forecasting {options.steps} steps from {options.start} with the weights of step {model.step}")
    forecast = model.forecast(options.start, options.steps)
    with replacing(options.output) as temporary:
        write_netcdf(forecast, temporary)
    names = ", ".join(str(name) for name in forecast.data_vars)
    print(f"{options.output}: {names}, valid {forecast.time.values[0]:.16} to {forecast.time.values[-1]:.16}")
    return ExitCode.FINISHED
