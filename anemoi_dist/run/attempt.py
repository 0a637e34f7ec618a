"""One attempt at a run as ``run.json`` records it: on what it runs, since when, and how it ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import time

from anemoi_dist.errors import ExitCode
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.lock import Holder, hold_ranks
from anemoi_dist.run.records import AttemptRecord, Failure, Owner, RunState

_STATES = {
    ExitCode.FINISHED: "finished",
    ExitCode.SAVED_RUN_AGAIN: "preempted",
    ExitCode.INTERRUPTED: "cancelled",
}
#: How a rank's error reads that has only lost another rank.
_LOST_PEER = re.compile(r"connection|peer|broken pipe|gloo|nccl|DistBackendError|TCPStore|interrupted", re.IGNORECASE)


def end_state(code: ExitCode) -> str:
    """Return the run's state after a process that ended with ``code``."""
    return _STATES.get(code, "failed")


class Attempt:
    """Holds a run for one process and records it. Rank 0 only; its owner has seen to it that nobody else starts ranks.

    Parameters
    ----------
    run : RunDirectory
        The run; its directory exists.
    world_size : int
        Ranks of this attempt.
    max_steps : int
        Where this attempt ends if nothing stops it.

    Attributes
    ----------
    number : int
        Attempts are counted from 1.
    changes : list[Change]
        Differences from the configuration of the last attempt.

    Raises
    ------
    HeldError
        Ranks of an earlier start are still there after they were asked to leave.
    """

    def __init__(self, run: RunDirectory, *, world_size: int, max_steps: int) -> None:
        self._run = run
        self._hold = hold_ranks(run, say=lambda text: print(text, flush=True))  # noqa: T201
        holder = Holder.here()
        with run.changing_state() as state:
            self.number = len(state.attempts) + 1
            self.changes = (state.changes or []) if state.attempts else []
            # They belong to this attempt alone: a restart, which nobody prepares, changes nothing.
            state.changes = None
            state.attempts.append(
                AttemptRecord(
                    self.number,
                    started=time.time(),
                    world_size=world_size,
                    max_steps=max_steps,
                    changes=self.changes,
                    launcher=os.environ.get(LAUNCHED, "torchrun"),
                    num_nodes=max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))),
                    job_id=holder.job_id,
                    life=holder.life,
                )
            )
            state.state, state.owner = "running", Owner(holder.pid, host=holder.host, started=holder.started)
        run.logs_dir(self.number).mkdir(mode=0o700, parents=True, exist_ok=True)

    def end(self, code: ExitCode, *, failure: Failure | None = None) -> ExitCode:
        """Record how the attempt ended and let go of the run; return what stands, as :func:`record_end` does."""
        code = record_end(self._run, self.number, code, failure=failure)
        self._hold.release()
        return code


def record_end(run: RunDirectory, number: int, code: ExitCode, *, failure: Failure | None = None) -> ExitCode:
    """Record the end of an attempt, on whichever rank sees it first; the first record stands, and its code is returned.

    Of ranks that fail with the same error the lowest is named: rank 0 has said it on the terminal, and once is enough.

    Parameters
    ----------
    run : RunDirectory
        The run.
    number : int
        The attempt.
    code : ExitCode
        How it ended.
    failure : Failure, optional
        Which rank failed, and how.
    """
    with run.changing_state() as state:
        attempt = state.attempts[number - 1]
        if attempt.exit_code is not None:
            first = attempt.failure
            if first and failure and failure.error == first.error and (failure.rank or 0) < (first.rank or 0):
                attempt.failure = failure
            return ExitCode(attempt.exit_code)
        attempt.ended, attempt.failure = time.time(), failure
        _end(state, attempt, code)
    return code


def _end(state: RunState, attempt: AttemptRecord, code: ExitCode) -> None:
    attempt.exit_code, attempt.state = int(code), end_state(code)
    state.state, state.owner = attempt.state, None


def record_killed(run: RunDirectory, *, rank: int, pid: int, number: signal.Signals, attempts_before: int) -> None:
    """Record that a rank of the attempt that runs was killed: it could not do so itself, and the others blame others.

    A rank that only lost it may have recorded its own error before; that is replaced, and no other.

    Parameters
    ----------
    run : RunDirectory
        The run.
    rank, pid : int
        Who was killed, on this host.
    number : signal.Signals
        By what.
    attempts_before : int
        Attempts recorded when the ranks were started: the rank may have gone before there was one more.
    """
    with run.changing_state() as state:
        if len(state.attempts) <= attempts_before:
            return
        attempt = state.attempts[-1]
        if attempt.exit_code not in (None, ExitCode.INTERNAL):
            return
        first = attempt.failure
        if first is not None and (first.rank == rank or not _LOST_PEER.search(first.error or "")):
            return
        why = " (out of memory? dmesg says)" if number == signal.SIGKILL else ""
        attempt.failure = Failure(
            rank,
            host=socket.gethostname(),
            pid=pid,
            error=f"killed by {number.name}{why}",
            signal=number.name,
            log=str(run.log_file(attempt.number, rank)),
        )
        attempt.ended = attempt.ended or time.time()
        _end(state, attempt, ExitCode.INTERNAL)


def is_finished(run: RunDirectory, *, max_steps: int) -> bool:
    """Whether the run has reached ``max_steps`` and was scored: there is nothing left to do."""
    state = run.read_state()
    return state.state == "finished" and (state.attempts[-1].max_steps or 0) >= max_steps
