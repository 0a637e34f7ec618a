"""Recording of attempts in ``run.json``: their start, their end and their failures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

from anemoi_dist.errors import ExitCode
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.lock import Holder, hold_ranks
from anemoi_dist.run.records import AttemptRecord, Failure, Owner, RunState, from_json, to_json

#: Environment variable of ranks: the file of their launcher for an end that ``run.json`` cannot take.
ENDING = "ANEMOI_DIST_ENDING"
_STATES = {
    ExitCode.FINISHED: "finished",
    ExitCode.SAVED_RUN_AGAIN: "preempted",
    ExitCode.INTERRUPTED: "cancelled",
}
#: Errors of ranks that have only lost the connection to another rank.
_LOST_PEER = re.compile(r"connection|peer|broken pipe|gloo|nccl|DistBackendError|TCPStore|interrupted", re.IGNORECASE)


def end_state(code: ExitCode) -> str:
    """Return the run's state after a process that ended with ``code``."""
    return _STATES.get(code, "failed")


class Attempt:
    """One attempt of a run, held and recorded by its rank 0; the owner of the run ensures that no other is started.

    Parameters
    ----------
    run : RunDirectory
        The run; its directory exists.
    world_size : int
        Ranks of this attempt.
    max_steps : int
        Optimizer step at which this attempt ends if nothing stops it.

    Attributes
    ----------
    number : int
        Number of the attempt, from 1.
    changes : list[Change]
        Differences from the configuration of the last attempt.

    Raises
    ------
    HeldError
        Ranks of an earlier start have not left although they were asked to.
    """

    def __init__(self, run: RunDirectory, *, world_size: int, max_steps: int) -> None:
        self._run = run
        self._hold = hold_ranks(run, say=lambda text: print(text, flush=True))  # noqa: T201
        holder = Holder.here()
        with run.changing_state() as state:
            self.number = len(state.attempts) + 1
            self.changes = (state.changes or []) if state.attempts else []
            # They belong to this attempt alone: a restart is not prepared and changes nothing.
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
        run.reserve_space()

    def end(self, code: ExitCode, *, failure: Failure | None = None) -> ExitCode:
        """Record the end of the attempt and release the run; return the recorded code, as :func:`record_end` does."""
        try:
            code = record_end(self._run, self.number, code, failure=failure)
        finally:
            self._run.release_space()
            self._hold.release()
        return code


def record_end(run: RunDirectory, number: int, code: ExitCode, *, failure: Failure | None = None) -> ExitCode:
    """Record the end of an attempt, on whichever rank sees it first, and return the code that is recorded.

    A later record changes nothing, except that among ranks with the same error the lowest is named: rank 0 has already
    printed it on the terminal, so that the launcher need not repeat it.

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
        # Ranks that lose a peer fail after it: the first record is the cause.
        if attempt.exit_code is not None:
            first = attempt.failure
            if first and failure and failure.error == first.error and (failure.rank or 0) < (first.rank or 0):
                attempt.failure = failure
            return ExitCode(attempt.exit_code)
        attempt.ended, attempt.failure = time.time(), failure
        _end(state, attempt, code)
    return code


def leave_ending(number: int, code: ExitCode, *, failure: Failure | None) -> None:
    """Leave the end of an attempt, which ``run.json`` cannot take now, to the launcher on this machine."""
    note = os.environ.get(ENDING)
    if note is None:
        return
    content = {"attempt": number, "code": int(code), "failure": None if failure is None else to_json(failure)}
    with contextlib.suppress(OSError):  # the temporary directory is full too: the exit code is all that is left
        Path(note).write_text(json.dumps(content), encoding="utf-8")


def record_left_ending(run: RunDirectory, note: Path) -> bool:
    """Record the end that :func:`leave_ending` has left in ``note``; return whether there was one.

    Raises
    ------
    OSError
        ``run.json`` cannot be written.
    """
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    failure = content["failure"]
    record_end(
        run,
        content["attempt"],
        ExitCode(content["code"]),
        failure=None if failure is None else from_json(Failure, failure),
    )
    return True


def _end(state: RunState, attempt: AttemptRecord, code: ExitCode) -> None:
    attempt.exit_code, attempt.state = int(code), end_state(code)
    state.state, state.owner = attempt.state, None


def record_killed(run: RunDirectory, *, rank: int, pid: int, number: signal.Signals, attempts_before: int) -> None:
    """Record that a rank of the running attempt was killed, which it could not do itself.

    A rank that lost the connection to it may have recorded its own error before. That error is replaced, no other.

    Parameters
    ----------
    run : RunDirectory
        The run.
    rank, pid : int
        The killed process, on this host.
    number : signal.Signals
        The signal.
    attempts_before : int
        Attempts recorded when the ranks were started: the rank may have been killed before this one was recorded.
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
    """Whether the run has done ``max_steps`` steps and its final validation."""
    state = run.read_state()
    return state.state == "finished" and (state.attempts[-1].max_steps or 0) >= max_steps
