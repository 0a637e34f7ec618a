"""Launcher ``local``: torchrun on this machine. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.schema import Config
from anemoi_dist.run.directory import RunDirectory

from .base import Machine, Plan
from .supervisor import Job, signal_process, supervise

#: Ranks if there is no GPU: the fewest that still partition the optimizer's states.
RANKS_WITHOUT_GPU = 2
#: Without it gloo resolves the host name, which fails on many laptops and in containers.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def count_gpus(environ: Mapping[str, str] | None = None, *, proc: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Return how many GPUs a rank on this machine could see, without torch.

    Parameters
    ----------
    environ : Mapping[str, str], optional
        The environment; ``CUDA_VISIBLE_DEVICES`` counts, up to its first invalid entry, as in CUDA.
    proc : Path
        Where the driver lists its devices, for machines without ``nvidia-smi``.
    """
    environ = os.environ if environ is None else environ
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    named = None
    if visible is not None:
        entries = [entry.strip() for entry in visible.split(",")]
        invalid = [index for index, entry in enumerate(entries) if not entry or entry.startswith("-")]
        named = invalid[0] if invalid else len(entries)
        if named == 0:  # nvidia-smi, which takes a second, would still list the devices
            return 0
    present = _gpus_of_driver(environ, proc)
    return named if present and named is not None else present


def _gpus_of_driver(environ: Mapping[str, str], proc: Path) -> int:
    if tool := shutil.which("nvidia-smi", path=environ.get("PATH")):
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=True)
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
        except (subprocess.SubprocessError, OSError):
            return 0  # the tool without a working driver: torch would find no device either
    return len(list(proc.iterdir())) if proc.is_dir() else 0


def torchrun_command(run: RunDirectory, num_ranks: int) -> list[str]:
    """Return the command that trains ``run`` on this machine; pure.

    Everything is bound to the loopback address: a machine's host name need not resolve, and nobody else should connect.
    torchrun itself restarts no ranks: the launcher does, with fresh agents and a fresh port.

    Parameters
    ----------
    run : RunDirectory
        A prepared run.
    num_ranks : int
        Ranks to start.
    """
    return [
        sys.executable,
        "-m",
        "anemoi_dist.launch.job.agent",
        "--nnodes=1",
        f"--nproc-per-node={num_ranks}",
        "--rdzv-backend=anemoi-dist",
        "--rdzv-endpoint=127.0.0.1",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        "-m",
        "anemoi_dist.train",
        "--run-directory",
        str(run.path),
    ]


def rank_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of the ranks: the caller's, with our defaults where it says nothing."""
    defaults = {
        # OpenMP threads of several ranks that spin on one core make a step many times slower.
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # Ranks answer a stop request with a checkpoint. torchrun sends SIGKILL after 30 s, which may cut it off.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    }
    return {**defaults, **(os.environ if environ is None else environ)}


def plan(config: Config, run: RunDirectory, machine: Machine) -> Plan:
    """Return what :func:`train` would start; pure.

    Raises
    ------
    ConfigError
        The batch plan does not work out.
    """
    ranks = config.launcher.ranks or machine.num_gpus or RANKS_WITHOUT_GPU
    ranks_environment = {**LOOPBACK, **rank_environment(machine.environ)}
    return Plan(
        kind="local",
        nodes=1,
        ranks_per_node=ranks,
        batches=plan_batches(config, world_size=ranks),
        environment={k: v for k, v in ranks_environment.items() if machine.environ.get(k) != v},
        rendezvous="127.0.0.1, on a port that is reserved when the ranks start",
        command=(machine.python, *torchrun_command(run, ranks)[1:]),
    )


def train(run: RunDirectory, config: Config, *, num_ranks: int) -> int:
    """Train a run on this machine until it ends and return its exit code; see :func:`.supervisor.supervise`.

    Parameters
    ----------
    run : RunDirectory
        A prepared run, owned by this process.
    config : Config
        Its configuration.
    num_ranks : int
        Ranks to start.
    """
    run.stop_file.unlink(missing_ok=True)  # an earlier start that died has left it
    job = Job(
        run=run,
        kind="local",
        command=lambda restarts: torchrun_command(run, num_ranks),
        environment={**LOOPBACK, **rank_environment()},
        ask_to_stop=signal_process,
        facts={"nodes": 1, "ranks": num_ranks},
    )
    return supervise(job, config.launcher)
