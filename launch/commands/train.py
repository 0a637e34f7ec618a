"""``anemoi-dist train``: compose a configuration and train it on this machine. No torch."""

from __future__ import annotations

import argparse

from anemoi_dist.config.schema import Config
from anemoi_dist.errors import ConfigError, ExitCode
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.prepare import claim_run

from ..launchers import local, mpi
from ..launchers.base import plan
from ..launchers.machine import detect_machine
from ..status.inspection import refuse_queued
from .arguments import compose_options
from .plan import show_plan


def run(options: argparse.Namespace) -> int:
    """Train until the run ends and return its exit code; with ``--dry-run`` print the plan."""
    if options.strict:
        options.overrides.append("checkpoint.strict=true")
    return train(compose_options(options).config, dry_run=options.dry_run)


def train(config: Config, *, dry_run: bool = False) -> int:
    """Train a run on this machine until it ends and return its exit code.

    Parameters
    ----------
    config : Config
        The run's configuration.
    dry_run : bool, optional
        Print the plan and start nothing.

    Raises
    ------
    ConfigError
        The configuration cannot be launched here.
    PreflightError
        The run is queued or held by somebody, or this machine lacks what the launcher needs.
    """
    if dry_run:
        print(show_plan(config))
        return ExitCode.FINISHED
    if config.launcher.kind == "slurm":
        raise ConfigError(
            "launcher", "slurm", "is submitted, not started here", fix="anemoi-dist submit launcher=slurm"
        )
    run = RunDirectory.locate(config.run.root, str(config.run.id))
    # A queued job of this run would start its ranks alongside these, in the same directory.
    refuse_queued(run)
    machine = detect_machine(config.launcher.kind)
    planned = plan(config, run, machine)  # refuses before the run is touched
    if planned.kind == "mpi":
        mpi.check(config, machine)
    run, hold = claim_run(config)
    try:
        # Before the first rank prints anything it imports torch, which takes seconds.
        print(f"starting {planned.world_size} rank{'s' * (planned.world_size > 1)} of run {run.run_id}", flush=True)
        if planned.kind == "mpi":
            return mpi.train(run, config, planned)
        return local.train(run, config, num_ranks=planned.ranks_per_node)
    finally:
        hold.release()
