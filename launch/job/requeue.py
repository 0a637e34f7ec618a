"""Decide whether a SLURM job goes back into the queue after its ranks have ended. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from anemoi_dist.config.schema import LauncherConfig
from anemoi_dist.errors import ExitCode

from ..launchers.supervisor import RESTARTED
from ..status.journal import Entry


@dataclass(frozen=True)
class Outcome:
    """How one start of the job ended.

    Attributes
    ----------
    code : int
        The exit code of the run.
    first_signal : int, optional
        The signal that asked it to stop; None for none, or a person's stop file.
    progress : bool
        Whether it has saved anything new.
    request : str, optional
        ``stop`` or ``cancel`` if a person has asked for it.
    """

    code: int
    first_signal: int | None
    progress: bool
    request: str | None = None


@dataclass(frozen=True)
class History:
    """How often this job has gone back into the queue by itself.

    Attributes
    ----------
    requeues : int
        After a time limit.
    retries : int
        After a crash.
    saved_nothing : bool
        Whether the start before this one was asked to stop before it had saved anything.
    """

    requeues: int = 0
    retries: int = 0
    saved_nothing: bool = False

    @classmethod
    def count(cls, entries: Sequence[Entry], job_id: str) -> History:
        """Count the requeues of a job in the journal."""
        requeues = [entry for entry in entries if entry.event == "requeue" and entry.job_id == job_id]
        retries = sum(entry.code in RESTARTED for entry in requeues)
        last = requeues[-1] if requeues else None
        saved_nothing = last is not None and last.code == ExitCode.INTERRUPTED and not last.progress
        return cls(len(requeues) - retries, retries, saved_nothing)


@dataclass(frozen=True)
class Decision:
    """Whether the job goes back into the queue, why, and which requeue or retry that is."""

    requeue: bool
    reason: str
    count: int = 0


def decide(outcome: Outcome, history: History, launcher: LauncherConfig) -> Decision:
    """Return whether to requeue the job.

    Where SLURM itself ends the job (a preemption, ``scontrol requeue``, ``scancel``), SLURM knows what comes next.
    """
    code = outcome.code
    if code == ExitCode.FINISHED:
        return Decision(False, "finished")
    # Before any signal counts: a person's stop may end in the same code as the time limit's.
    if outcome.request is not None:
        return Decision(False, "stopped on request" if outcome.request == "stop" else "cancelled on request")
    if outcome.first_signal not in (None, signal.SIGUSR1):
        name = signal.Signals(outcome.first_signal).name
        return Decision(False, f"ended by SLURM ({name}), which decides whether the job runs again")
    if code in (ExitCode.SAVED_RUN_AGAIN, ExitCode.INTERRUPTED):
        return _after_stop(outcome, history, launcher)
    if code not in RESTARTED:
        return Decision(False, f"exit code {code} would recur: not requeued")
    # A crash at the same place again and again would use up the allocation without a single new checkpoint.
    if not outcome.progress:
        return Decision(False, "crashed without having saved anything new: not requeued")
    if history.retries >= launcher.max_retries:
        return Decision(False, f"crashed after launcher.max_retries={launcher.max_retries} retries")
    count = history.retries + 1
    return Decision(True, f"crashed: retry {count} of {launcher.max_retries}", count)


def _after_stop(outcome: Outcome, history: History, launcher: LauncherConfig) -> Decision:
    if outcome.first_signal is None:
        return Decision(False, "stopped on request")
    # Once may be bad luck, such as a slow file system; twice in a row would never end.
    if outcome.code == ExitCode.INTERRUPTED and not outcome.progress and history.saved_nothing:
        return Decision(False, "the time limit came before anything was saved, twice in a row: it is too short")
    if history.requeues >= launcher.max_requeues:
        return Decision(False, f"the time limit came after launcher.max_requeues={launcher.max_requeues} requeues")
    count = history.requeues + 1
    return Decision(True, f"the time limit is near: requeue {count} of {launcher.max_requeues}", count)
