"""sbatch: hand a batch script to SLURM, and turn a refusal into what to change. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from anemoi_dist.errors import ConfigError, PreflightError, print_message

from .slurm import SBATCH

#: sbatch gives up by itself long before, where slurmctld is down.
_SBATCH_TIMEOUT_S = 180
#: Words of SLURM's answer, in lower case -> what to change. The first that matches counts.
_FIXES = (
    ("partition", "launcher.slurm.partition=NAME; `sinfo -s` lists them"),
    ("account", "launcher.slurm.account=NAME; `sacctmgr show associations user=$USER` lists yours"),
    ("qos", "launcher.slurm.qos=NAME"),
    ("time limit", "a shorter launcher.time; `sinfo -s` shows the limits"),
    ("feature", "launcher.slurm.constraint=NAME; `sinfo -o '%n %f'` lists them"),
    ("unrecognized option", "launcher.slurm.options: `man sbatch` lists the names"),
    ("generic resource", "launcher.gpus_per_node; `sinfo -o '%n %G'` shows what there is"),
    ("processors", "fewer launcher.nodes or launcher.ranks; `sinfo -N -l` shows what there is"),
    ("node", "fewer launcher.nodes, launcher.gpus_per_node or launcher.ranks; `sinfo -N -l` shows what there is"),
    ("controller", "try again when slurmctld answers (`scontrol ping`)"),
)
_OTHER_FIX = "`anemoi-dist submit --dry-run ...` prints the batch script"


def require_sbatch() -> None:
    """Raise where this machine cannot submit jobs.

    Raises
    ------
    PreflightError
        There is no sbatch in PATH.
    """
    if shutil.which("sbatch") is None:
        raise PreflightError(
            "there is no sbatch on this machine: submit on a login node of the cluster, or run "
            "`anemoi-dist train launcher=local` here"
        )


def check_syntax(script: str) -> None:
    """Refuse a script that bash cannot read: the user's own setup lines are part of it.

    Raises
    ------
    ConfigError
        bash says why.
    """
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if checked.returncode:
        rule = f"makes a script that bash cannot read: {' '.join(checked.stderr.split())}"
        raise ConfigError("launcher.slurm.setup", "", rule, fix="correct the shell lines")


def sbatch(script: str, options: Mapping[str, object]) -> str:
    """Submit a batch script and return the id of its job.

    Parameters
    ----------
    script : str
        Its text, which sbatch gets on its standard input.
    options : Mapping[str, object]
        The ``#SBATCH`` options that it holds (:func:`.slurm.options`).

    Raises
    ------
    PreflightError
        sbatch does not answer, or SLURM refuses the job.
    """
    try:
        answer = subprocess.run(
            SBATCH,
            input=script,
            env=_environment(options),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SBATCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        name = options["job-name"]
        raise PreflightError(
            f"sbatch did not answer within {_SBATCH_TIMEOUT_S} s; `squeue --me --name={name}` says whether it was heard"
        ) from error
    except OSError as error:
        raise PreflightError(f"sbatch cannot be run: {error}") from error
    # On success it carries remarks of the site, such as the budget that is left.
    for line in answer.stderr.splitlines() if answer.returncode == 0 else ():
        print_message(line)
    # --parsable prints "ID;CLUSTER" on a federation; a site's wrapper may print lines of its own before it.
    job_id = answer.stdout.strip().splitlines()[-1].partition(";")[0] if answer.stdout.strip() else ""
    if answer.returncode or not job_id.isdecimal():
        lines = (" ".join(line.removeprefix("sbatch: error: ").split()) for line in answer.stderr.splitlines())
        refusal = "; ".join(filter(None, lines)) or f"exit code {answer.returncode}"
        fix = next((fix for word, fix in _FIXES if word in refusal.lower()), _OTHER_FIX)
        raise PreflightError(f"SLURM refuses the job: {refusal}\n  fix: {fix}")
    return job_id


def _environment(options: Iterable[str]) -> dict[str, str]:
    """Return this environment without the variables that would overrule what the script says."""
    # SBATCH_* variables win over #SBATCH lines: an old SBATCH_TIMELIMIT would silently cut the job short.
    spelled = {"time": "TIMELIMIT", "gpus-per-node": "GPUS_PER_NODE"}
    overruling = {f"SBATCH_{spelled.get(name, name.replace('-', '_').upper())}" for name in options}
    return {name: value for name, value in os.environ.items() if name not in overruling | {"SBATCH_NO_REQUEUE"}}
