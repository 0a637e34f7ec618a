"""torchrun on this machine: how many ranks, with what command and environment, and how it ended. No torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from anemoi_dist.config import Config, plan_batches
from anemoi_dist.errors import ExitCode
from anemoi_dist.parent import PARENT_PID
from anemoi_dist.run_directory import LAUNCHED, RunDirectory

from .plan import Machine, Plan

#: Ranks where there is no GPU: the fewest that still partition the optimizer's states.
RANKS_WITHOUT_GPU = 2


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
        if named == 0:
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


def num_ranks(config: Config, *, environ: Mapping[str, str] | None = None) -> int:
    """Return ``launcher.ranks``, or one a GPU, or 2; refuse a global batch that does not divide.

    Raises
    ------
    ConfigError
        The batch plan does not work out with that many ranks.
    """
    ranks = config.launcher.ranks or count_gpus(environ) or RANKS_WITHOUT_GPU
    plan_batches(config.training, world_size=ranks)
    return ranks


def torchrun_command(run: RunDirectory, config: Config, num_ranks: int) -> list[str]:
    """Return the command that trains ``run`` on this machine; pure.

    Everything is bound to the loopback address: a machine's host name need not resolve, and nobody else should connect.

    Parameters
    ----------
    run : RunDirectory
        A prepared run.
    config : Config
        Its configuration.
    num_ranks : int
        Ranks to start.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={num_ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        f"--max-restarts={config.launcher.max_restarts}",
        "-m",
        "anemoi_dist.train",
        "--run-directory",
        str(run.path),
    ]


def rank_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of the ranks: the caller's, with our defaults where it says nothing."""
    defaults = {
        # Two spinning threads a rank on a shared core cost many times the work.
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # With the shared store, an in-place restart after a killed rank hangs now and then.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # A stop request is answered by a checkpoint: torchrun's 30 s before SIGKILL may be too few to write it.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
        LAUNCHED: "1",
    }
    return {**defaults, **(os.environ if environ is None else environ)}


def plan(config: Config, run: RunDirectory, machine: Machine) -> Plan:
    """Say what :func:`train` would start; pure.

    Raises
    ------
    ConfigError
        The batch plan does not work out.
    """
    ranks = config.launcher.ranks or machine.num_gpus or RANKS_WITHOUT_GPU
    ranks_environment = rank_environment(machine.environ)
    return Plan(
        kind="local",
        nodes=1,
        ranks_per_node=ranks,
        batches=plan_batches(config.training, world_size=ranks),
        environment={k: v for k, v in ranks_environment.items() if machine.environ.get(k) != v},
        rendezvous="127.0.0.1, on a port that torchrun finds free",
        command=(machine.python, *torchrun_command(run, config, ranks)[1:]),
    )


def train(run: RunDirectory, config: Config, *, num_ranks: int) -> int:
    """Run torchrun until it ends and return the exit code of the run.

    SIGINT and SIGTERM (SIGHUP as SIGTERM) go to torchrun, which passes them to the ranks; they save and leave. A second
    one kills.

    Parameters
    ----------
    run : RunDirectory
        A prepared run.
    config : Config
        Its configuration.
    num_ranks : int
        Ranks to start.
    """
    attempts_before = len(run.read_state()["attempts"])
    command = torchrun_command(run, config, num_ranks)
    # The same arguments through our agent: torchrun, less its traceback for a rank that has already said why it ended.
    command[2] = "anemoi_dist.launch.agent"
    # A session of its own: Ctrl-C in a terminal reaches this process alone, and torchrun hears of it once.
    environment = rank_environment() | {PARENT_PID: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    stopper = _Stopper(process)
    with stopper:
        agent_code = process.wait()
    code, message = outcome(run, agent_code, attempts_before=attempts_before, interrupted=stopper.interrupted)
    if message:
        print(message, file=sys.stderr)  # noqa: T201
    return code


class _Stopper:
    """Passes stop signals on to torchrun while it runs."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._former: dict[int, Any] = {}
        self.interrupted = False

    def __enter__(self) -> None:
        self._former = {number: signal.signal(number, self._stop) for number in self._SIGNALS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # os.write: print may not be entered again from a handler that interrupted it.
        if self.interrupted:
            os.write(2, b"killed; what was saved last is intact\n")
            os.killpg(self._process.pid, signal.SIGKILL)
            return
        self.interrupted = True
        os.write(2, f"{signal.Signals(number).name}: saving and stopping; once more kills\n".encode())
        self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def outcome(run: RunDirectory, agent_code: int, *, attempts_before: int, interrupted: bool) -> tuple[int, str]:
    """Return how the run ended: its exit code, and what to tell the user (nothing where the ranks have said it).

    torchrun answers 1 for any failure, so what counts is what rank 0 wrote into ``run.json``.

    Parameters
    ----------
    run : RunDirectory
        The run.
    agent_code : int
        What the agent returned; a code of ours where the first rank that failed left with one.
    attempts_before : int
        Attempts recorded before this start.
    interrupted : bool
        Whether a stop was asked for through this process.
    """
    attempts = run.read_state()["attempts"]
    last = attempts[-1] if len(attempts) > attempts_before else None
    code = None if last is None else last.get("exit_code")
    if code is not None and code != ExitCode.INTERNAL:
        return int(code), ""
    if interrupted and code is None:
        return ExitCode.INTERRUPTED, f"stopped before anything was saved; the same command starts {run.run_id} again"
    if last is None:
        # Nothing to do for a finished run, or refused before the attempt began: rank 0 has said so.
        if agent_code in set(ExitCode):
            return agent_code, ""
        return ExitCode.INTERNAL, (
            f"run {run.run_id}: no rank got as far as recording its start (torchrun returned {agent_code}); "
            f"what they printed is above"
        )
    attempt = int(last.get("attempt", len(attempts)))
    how = "failed" if code is not None else "ended without a word: a rank was killed or crashed (out of memory?)"
    return ExitCode.INTERNAL, (
        f"run {run.run_id}: attempt {attempt} {how}; read above what rank 0 said, and the other ranks' files in "
        f"{run.logs_dir(attempt)}; the same command continues from the last checkpoint"
    )
