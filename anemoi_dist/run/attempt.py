"""One attempt at a run as ``run.json`` records it: on what it runs, since when, and how it ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

from anemoi_dist.errors import ExitCode
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.lock import Holder, hold_ranks

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
    changes : list[dict[str, Any]]
        What differs from the configuration of the last attempt: ``key``, ``was``, ``is``.

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
            self.number = len(state["attempts"]) + 1
            # Of this attempt alone: a restart, which nobody prepares, changes nothing.
            left: list[dict[str, Any]] = state.pop("changes", [])
            self.changes = left if state["attempts"] else []
            record = {"attempt": self.number, "started": time.time(), "world_size": world_size, "max_steps": max_steps}
            state["attempts"].append({**record, "changes": self.changes, **_place(holder, world_size)})
            state |= {"state": "running", "owner": {"pid": holder.pid, "host": holder.host, "started": holder.started}}
        run.logs_dir(self.number).mkdir(mode=0o700, parents=True, exist_ok=True)

    def end(self, code: ExitCode, *, failure: Mapping[str, Any] | None = None) -> ExitCode:
        """Record how the attempt ended and let go of the run; return what stands, as :func:`record_end` does."""
        code = record_end(self._run, self.number, code, failure=failure)
        self._hold.release()
        return code


def _place(holder: Holder, world_size: int) -> dict[str, Any]:
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return {
        "launcher": os.environ.get(LAUNCHED, "torchrun"),
        "num_nodes": max(1, world_size // ranks_per_node),
        "job_id": holder.job_id,
        "life": holder.life,
    }


def record_end(run: RunDirectory, number: int, code: ExitCode, *, failure: Mapping[str, Any] | None = None) -> ExitCode:
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
    failure : Mapping[str, Any], optional
        Of the rank that failed: ``rank``, ``host``, ``pid``, ``error`` (its traceback or message), ``log``; of a hang
        also ``hang`` (:class:`anemoi_dist.telemetry.watchdog.Hang`).
    """
    with run.changing_state() as state:
        attempt = state["attempts"][number - 1]
        if "exit_code" in attempt:
            told = attempt.get("failure")
            if told and failure and failure["error"] == told["error"] and failure["rank"] < told["rank"]:
                attempt["failure"] = dict(failure)
            return ExitCode(attempt["exit_code"])
        ended = end_state(code)
        attempt |= {"ended": time.time(), "exit_code": int(code), "state": ended}
        if failure is not None:
            attempt["failure"] = dict(failure)
        state |= {"state": ended, "owner": None}
    return code


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
        if len(state["attempts"]) <= attempts_before:
            return
        attempt = state["attempts"][-1]
        told = attempt.get("failure")
        if attempt.get("exit_code", ExitCode.INTERNAL) != ExitCode.INTERNAL:
            return
        if told is not None and (told["rank"] == rank or not _LOST_PEER.search(told["error"])):
            return
        why = " (out of memory? dmesg says)" if number == signal.SIGKILL else ""
        attempt["failure"] = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": pid,
            "error": f"killed by {number.name}{why}",
            "signal": number.name,
            "log": str(run.log_file(len(state["attempts"]), rank)),
        }
        ended = end_state(ExitCode.INTERNAL)
        attempt.setdefault("ended", time.time())
        attempt |= {"exit_code": int(ExitCode.INTERNAL), "state": ended}
        state |= {"state": ended, "owner": None}


def is_finished(run: RunDirectory, *, max_steps: int) -> bool:
    """Whether the run has reached ``max_steps`` and was scored: there is nothing left to do."""
    state = run.read_state()
    return state["state"] == "finished" and state["attempts"][-1].get("max_steps", 0) >= max_steps
