"""torchrun as our launchers start it: it dies with its launcher, meets at a reserved port, names the rank that failed.

Started as a process on every node; with ``agent_rendezvous.py`` the only part of the control side that imports torch.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anemoi_dist.errors import AnemoiDistError, ExitCode, print_error, print_message
from anemoi_dist.process.output import protect_output
from anemoi_dist.process.parent_death import PARENT_PID, die_with_parent, parent_in_environment
from anemoi_dist.run.attempt import record_killed
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.watchdog import record_unreported_hang

#: Signals that ask a process to leave, torchrun's own among them. Any other that ends a rank is a kill or a crash.
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

#: Ranks that fail within this time fail together. torchrun kills the others later: it gives them far longer to leave.
_AT_ONCE_S = 5

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


def main() -> int:
    """Run torchrun with this process's arguments; return the exit code of the first rank that failed, if it is ours."""
    die_with_parent(parent_pid=parent_in_environment(), number=signal.SIGTERM)
    protect_output()
    os.environ[PARENT_PID] = str(os.getpid())  # for the ranks
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from .agent_rendezvous import register

    register()
    # torchrun logs a traceback for every rank that ends with a code, also for those that mean "saved" or "your
    # configuration is wrong". Errors of torchrun itself are exceptions, and still seen.
    logging.disable(logging.ERROR)
    run = _run_directory(sys.argv)
    try:
        attempts_before = len(run.read_state().attempts) if run else 0  # no rank is there yet to add one
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = _cause(error)
        if run:
            try:
                _record(run, rank, failure, attempts_before=attempts_before)
            except OSError as unrecorded:
                print_message(f"the end of rank {rank} cannot be recorded: {unrecorded}")
        if failure.exitcode in set(ExitCode):
            return failure.exitcode
        how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"code {failure.exitcode}"
        where = f"rank {rank} (pid {failure.pid} on {socket.gethostname()})"
        print_message(f"{where} ended with {how}")
        return 1
    except AnemoiDistError as error:  # agents that do not find each other
        print_error(error)
        return error.exit_code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _record(run: RunDirectory, rank: int, failure: ProcessFailure, *, attempts_before: int) -> None:
    """Record the end of a rank that could not do so itself."""
    if failure.exitcode == ExitCode.HANG:
        record_unreported_hang(run)
    if failure.exitcode < 0 and -failure.exitcode not in _ASKING:
        number = signal.Signals(-failure.exitcode)
        record_killed(run, rank=rank, pid=failure.pid, number=number, attempts_before=attempts_before)


def _run_directory(arguments: list[str]) -> RunDirectory | None:
    """Return the run on the command line of the ranks; None if it is started for something else."""
    if "--run-directory" not in arguments[:-1]:
        return None
    return RunDirectory(Path(arguments[arguments.index("--run-directory") + 1]))


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Return the rank whose failure made the others fail: one that was killed, else the first that left by itself.

    The other ranks notice within milliseconds that one is gone, and torchrun sees several failures at once. It then
    asks the rest to leave; those that do not, and are killed for it, are among the failures too.
    """
    began = min(failure.timestamp for failure in error.failures.values())
    asked = {-int(number) for number in _ASKING}
    candidates = {
        rank: failure
        for rank, failure in error.failures.items()
        if failure.exitcode not in asked and failure.timestamp - began <= _AT_ONCE_S
    }
    killed = [(rank, failure) for rank, failure in candidates.items() if failure.exitcode < 0]
    if killed or not candidates:
        return killed[0] if killed else error.get_first_failure()
    return min(candidates.items(), key=lambda failed: failed[1].timestamp)


if __name__ == "__main__":
    sys.exit(main())
