"""One attempt at a run as ``run.json`` records it: who holds the run, since when, and how it ended."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import IO, Any

from anemoi_dist.errors import ExitCode, PreflightError
from anemoi_dist.run_directory import RunDirectory

_STATES = {
    ExitCode.FINISHED: "finished",
    ExitCode.SAVED_RUN_AGAIN: "preempted",
    ExitCode.INTERRUPTED: "cancelled",
}


def end_state(code: ExitCode) -> str:
    """Return the run's state after a process that ended with ``code``."""
    return _STATES.get(code, "failed")


class Attempt:
    """Holds a run for one process and records it. Rank 0 only.

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
    changes : list[dict[str, Any]]
        What differs from the configuration of the last attempt: ``key``, ``was``, ``is``.

    Raises
    ------
    PreflightError
        Another process holds the run. The kernel drops the lock with its holder, however it dies.
    """

    def __init__(self, run: RunDirectory, *, world_size: int, max_steps: int) -> None:
        self._run = run
        self._lock: IO[str] = run.lock_file.open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            owner = run.read_state().get("owner") or {}
            raise PreflightError(
                f"run {run.run_id} is held by process {owner.get('pid', '?')} on {owner.get('host', '?')}; wait for "
                "it, stop it, or take another run.id"
            ) from error
        state = run.read_state()
        self.number = len(state["attempts"]) + 1
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        state |= {"state": "running", "owner": owner}
        self.changes: list[dict[str, Any]] = state.get("changes", []) if state["attempts"] else []
        record = {"attempt": self.number, "started": time.time(), "world_size": world_size, "max_steps": max_steps}
        state["attempts"].append({**record, "changes": self.changes})
        run.write_state(state)
        run.logs_dir(self.number).mkdir(mode=0o700, parents=True, exist_ok=True)

    def end(self, code: ExitCode) -> ExitCode:
        """Record how the attempt ended and let go of the run; return what stands, as :func:`record_end` does."""
        code = record_end(self._run, self.number, code)
        self._lock.close()
        return code


def record_end(run: RunDirectory, number: int, code: ExitCode, **details: Any) -> ExitCode:
    """Record the end of an attempt, on whichever rank sees it first; the first record stands and is returned.

    Parameters
    ----------
    run : RunDirectory
        The run.
    number : int
        Of the attempt.
    code : ExitCode
        How it ended.
    **details : Any
        What else to record with it.
    """
    state = run.read_state()
    attempt = state["attempts"][number - 1]
    if "exit_code" in attempt:
        return ExitCode(attempt["exit_code"])
    ended = end_state(code)
    attempt |= {"ended": time.time(), "exit_code": int(code), "state": ended, **details}
    run.write_state({**state, "state": ended, "owner": None})
    return code


def is_finished(run: RunDirectory, *, max_steps: int) -> bool:
    """Whether the run has reached ``max_steps`` and was scored: there is nothing left to do."""
    state = run.read_state()
    return state["state"] == "finished" and state["attempts"][-1].get("max_steps", 0) >= max_steps
