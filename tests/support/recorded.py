"""Records of runs that never ran, for what reads them."""

import math

import numpy as np

from anemoi_dist.run.events import EventLog
from support.many_runs import write_state

MEMORY = {"parameters": 4096, "master": 2048, "states": {"exp_avg_fast": 1024, "exp_avg_slow": 1024}}
BASELINES = {"persistence": (258.0, 0.93), "climatology": (903.0, None), "tide_tendency": (171.0, 0.96)}


def scores(model_rmse, *, variable="msl"):
    """Scores of the model and its baselines at 6 and 12 h."""
    rows = []
    for factor, hours in ((1, 6), (2, 12)):
        common = {"variable": variable, "lead_s": hours * 3600}
        rows.append({"forecast": "model", "rmse": model_rmse * factor, "acc": 0.98, **common})
        for name, (rmse, acc) in BASELINES.items():
            rows.append({"forecast": name, "rmse": rmse * factor, "acc": acc, **common})
    return rows


def write_steps(log, steps, **fields):
    for step in steps:
        values = {
            "loss": 1.0 / step, "lr": 1e-3, "grad_norm": 10.0 / step, "alpha": 0.1 * step,
            "beta3": 1 - 1 / (10 + step), "samples_per_s": 50.0, "eta_s": 1.0, "memory_bytes": 2**29,
        }  # fmt: skip
        log.write("step", step=step, **{**values, **fields})


def write_forecast(run, *, variable="msl", num_leads=2, **changes):
    latitudes, longitudes = np.linspace(90, -90, 13), np.arange(0.0, 360.0, 15.0)
    wave = np.cos(np.radians(latitudes))[:, None] * np.sin(np.radians(longitudes))[None]
    truth = 101300 + 2000 * np.stack([wave * (1 + lead) for lead in range(num_leads)])
    arrays = {
        "truth": truth, "forecast": truth + 100 * wave, "persistence": truth + 300 * wave,
        "lead_s": 21600 * np.arange(1, num_leads + 1), "latitudes": latitudes, "longitudes": longitudes,
        "date": 1766750400, "variable": variable,
    }  # fmt: skip
    np.savez(run.report_dir / "forecast.npz", **{**arrays, **changes})


def fill(run):
    """Record a run of two attempts: killed at step 70, resumed from 50, finished at 100."""
    now = iter(range(1766000000, 1766100000))
    log = EventLog(run.events_file, clock=lambda: float(next(now)))
    start = {
        "run_id": run.run_id, "engine": "zero2", "world_size": 2, "num_parameters": 1234567,
        "versions": {"torch": "2.13.0"}, "memory": [MEMORY, MEMORY],
    }  # fmt: skip
    log.write("start", step=0, attempt=1, resumed_from_step=None, **start)
    write_steps(log, (1, *range(10, 80, 10)))
    log.write("skipped_update", step=33, loss=math.nan, grad_norm=math.inf, lr=1e-3)
    log.write("validation", step=50, split="validation", scores=scores(200.0))
    log.write("start", step=50, attempt=2, resumed_from_step=50, **start)
    write_steps(log, range(60, 110, 10))
    log.write("validation", step=100, split="validation", scores=scores(130.0))
    log.write("validation", step=100, split="test", scores=scores(127.0))
    log.write(
        "end", step=100, state="finished", exit_code=0,
        seconds={"startup": 5.0, "data": 1.0, "step": 80.0, "validation": 10.0, "checkpoint": 4.0},
    )  # fmt: skip
    log.close()
    run.config_file.write_text(
        "run: {seed: 7}\n"
        "training:\n  max_steps: 100\n  global_batch_size: 16\n  precision: fp32\n"
        "  optimizer: {_target_: anemoi_dist.optimizers.ademamix.AdEMAMix}\n"
        "model: {_target_: some.Model, note: <b>&bold}\n"
    )
    write_state(run, {"state": "finished", "attempts": []})
    write_forecast(run)
