"""Launcher ``slurm``: the batch script of a job, as a pure function of the configuration. No torch.

The script holds SLURM's options, prepares the shell and then execs ``launch/job/batch.py``: SLURM's signals for the
batch script reach Python, and decisions are made in code that has tests.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.launcher_checks import check_value
from anemoi_dist.config.schema import Config, LauncherConfig
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import RunDirectory

from .base import Machine, Plan
from .local import RANKS_WITHOUT_GPU

#: It reads the script from its standard input, so that nothing is written before SLURM has accepted the job.
SBATCH = ("sbatch", "--parsable")
#: Characters that may have a meaning in ``#SBATCH`` lines.
_SPECIAL = re.compile(r"[^A-Za-z0-9_@%+=:,./\[\]-]")


def num_ranks_per_node(launcher: LauncherConfig) -> int:
    """Return ``launcher.ranks``, or one a GPU that each node gives, or 2."""
    return launcher.ranks or launcher.gpus_per_node or RANKS_WITHOUT_GPU


def plan(config: Config, run: RunDirectory, machine: Machine) -> Plan:
    """Return what ``anemoi-dist submit`` would put into the queue; pure.

    Raises
    ------
    ConfigError
        The batch plan does not work out, or the run's path has no place in a batch script.
    """
    launcher = config.launcher
    ranks = num_ranks_per_node(launcher)
    if launcher.gpus_per_node and ranks > launcher.gpus_per_node:
        raise ConfigError(
            "launcher.ranks",
            ranks,
            f"is more than one rank a GPU (launcher.gpus_per_node={launcher.gpus_per_node})",
            fix=f"launcher.ranks={launcher.gpus_per_node}",
        )
    return Plan(
        kind="slurm",
        nodes=launcher.nodes,
        ranks_per_node=ranks,
        batches=plan_batches(config, world_size=launcher.nodes * ranks),
        environment={},
        rendezvous="the job's first node, on a port that is bound there",
        command=SBATCH,
        script=render(config, run, python=machine.python),
    )


def render(
    config: Config,
    run: RunDirectory,
    *,
    python: str,
    arguments: Sequence[str] = (),
    dependency: str | None = None,
) -> str:
    """Return the batch script of a run; pure, every value quoted.

    Parameters
    ----------
    config : Config
        The run's configuration.
    run : RunDirectory
        Its directory.
    python : str
        The interpreter of the job, a path that every node sees.
    arguments : Sequence[str], optional
        Arguments of ``launch/job/batch.py`` after the run directory.
    dependency : str, optional
        Job that must end before this one starts, as in ``afterok:12``.

    Raises
    ------
    ConfigError
        The run's path cannot be written into a batch script.
    """
    # exec: SLURM signals the batch script's own process, which has to be Python then.
    job = [python, "-m", "anemoi_dist.launch.job", str(run.path), *arguments]
    for text in job:
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise ConfigError("argument", text, "holds bytes that are not UTF-8", fix="leave it out")
    lines = ["#!/bin/bash", *_options(config, run, dependency), "", *_preparation(config), f"exec {shlex.join(job)}"]
    return "\n".join(lines) + "\n"


def options(config: Config, run: RunDirectory, dependency: str | None = None) -> dict[str, object]:
    """Return the ``#SBATCH`` options in the order of the script; True for those without a value."""
    launcher = config.launcher
    slurm = launcher.slurm
    path = str(run.path)
    check_value("run.root", path)
    if "\\" in path:
        raise ConfigError("run.root", path, "holds a backslash, which SLURM interprets differently", fix="rename it")
    found: dict[str, object] = {
        "job-name": run.run_id,
        "nodes": launcher.nodes,
        "ntasks-per-node": num_ranks_per_node(launcher),
        "gpus-per-node": launcher.gpus_per_node or None,
        "time": launcher.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        **slurm.options,
        "dependency": dependency,
        # Otherwise a job whose dependency has failed stays in the queue for ever.
        "kill-on-invalid-dep": None if dependency is None else "yes",
        "requeue": True,
        # Otherwise the log is truncated when SLURM starts the job again after a requeue.
        "open-mode": "append",
        # B: sends it to the batch script alone; otherwise srun gets it too, and it kills torchrun before ranks save.
        "signal": f"B:USR1@{slurm.signal_s}",
        "output": path.replace("%", "%%") + "/logs/slurm-%j.log",
    }
    return {name: value for name, value in found.items() if value is not None and value is not False}


def _options(config: Config, run: RunDirectory, dependency: str | None) -> list[str]:
    return [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={_escaped(str(value))}"
        for name, value in options(config, run, dependency).items()
    ]


def _escaped(text: str) -> str:
    """Escape a value of an ``#SBATCH`` line: SLURM's own parser reads quotes, backslashes and comments."""
    # It drops a backslash before a space: only quotes keep spaces.
    if _SPECIAL.search(text) is None:
        return text
    return f'"{_SPECIAL.sub(lambda match: match[0] if match[0] == " " else chr(92) + match[0], text)}"'


def _preparation(config: Config) -> list[str]:
    slurm = config.launcher.slurm
    lines = []
    # A module that fails to load ends the job here: later it would be a missing library on one of the ranks.
    if slurm.modules:
        # A batch shell is no login shell: on many clusters only the profile defines `module`.
        lines.append("type module >/dev/null 2>&1 || source /etc/profile")
        lines += [f"module load {shlex.quote(module)} || exit 3" for module in slurm.modules]
    if slurm.setup:
        lines += ["set -e", *slurm.setup, "set +e"]
    return [*lines, ""] if lines else []
