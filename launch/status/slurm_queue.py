"""SLURM's view of jobs, through its commands. No torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from anemoi_dist.errors import PreflightError

#: SLURM's own tools try for 18 s or more where slurmctld is down. A person waits for the answer.
TIMEOUT_S = 3.0
#: State of a job that neither the queue nor the accounting knows (any more).
GONE = "GONE"

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_HELD = {"REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
_JOB_ID = re.compile(r"\d+(_\d+)?")
_FIELDS = (
    "JobID",
    "JobArrayID",
    "State",
    "Reason",
    "RestartCnt",
    "StartTime",
    "EndTime",
    "NodeList",
    "exit_code",
)
_SACCT_FIELDS = ("JobIDRaw", "JobID", "State", "Start", "End", "NodeList", "ExitCode")


class QueueError(PreflightError):
    """The scheduler gives no answer; what it runs keeps running."""


@dataclass(frozen=True)
class JobView:
    """A job as the scheduler sees it now.

    Attributes
    ----------
    job_id : str
        As it was asked for.
    state : str
        SLURM's word, such as ``PENDING``, or :data:`GONE`.
    reason : str
        Why it waits, or why it ended; empty where there is nothing to say.
    restarts : int or None
        Times that it went back into the queue; the accounting does not say it.
    start_time : float or None
        When it started, or is expected to; seconds since 1970-01-01 UTC.
    end_time : float or None
        When it ended, or its time limit ends it.
    nodes : str
        Its nodes, in SLURM's short form.
    exit_code : int or None
        Of the batch script, once it is over; 128 + the number of the signal that killed it.
    """

    job_id: str
    state: str
    reason: str = ""
    restarts: int | None = None
    start_time: float | None = None
    end_time: float | None = None
    nodes: str = ""
    exit_code: int | None = None

    @property
    def is_waiting(self) -> bool:
        """It is in the queue and has no nodes."""
        return self.state in _WAITING

    @property
    def is_held(self) -> bool:
        """It waits until somebody lets it go."""
        return self.state in _HELD or self.reason.startswith("JobHeld")

    @property
    def is_completing(self) -> bool:
        """Its processes are being ended; it may go back into the queue after that."""
        return self.state == "COMPLETING"

    @property
    def is_over(self) -> bool:
        """It will not run again by itself."""
        return self.state in _OVER or self.state == GONE

    @property
    def is_running(self) -> bool:
        """It has nodes: running, or in one of SLURM's many states around that."""
        return not (self.is_waiting or self.is_completing or self.is_over)


class SlurmQueue:
    """SLURM through its commands: ``squeue``, for what it has forgotten ``sacct``, and ``scancel``.

    Parameters
    ----------
    timeout_s : float
        After this time a command is ended, and :class:`QueueError` raised.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def views(self, job_ids: Iterable[str]) -> dict[str, JobView]:
        """Return what is known of each job; :data:`GONE` for those that SLURM does not know.

        Parameters
        ----------
        job_ids : Iterable[str]
            ``12`` or, of an array, ``12_3``. What is neither is no job of SLURM's and left out.

        Raises
        ------
        QueueError
            SLURM does not answer: nothing is known about any of them.
        """
        wanted = sorted({job_id for job_id in job_ids if _JOB_ID.fullmatch(job_id)})
        if not wanted:
            return {}
        # One question for all jobs: every squeue locks slurmctld's job table, and sites ask users not to poll.
        found = self._squeue(wanted)
        missing = [job_id for job_id in wanted if job_id not in found]
        found |= self._sacct(missing)
        return {job_id: found.get(job_id, JobView(job_id, GONE)) for job_id in wanted}

    def view(self, job_id: str) -> JobView:
        """Return what is known of one job; see :meth:`views`."""
        return self.views([job_id])[job_id]

    def cancel(self, job_id: str) -> None:
        """End a job at once; one that is over already is left alone.

        Raises
        ------
        QueueError
            SLURM does not answer, or refuses.
        """
        # A job that ends by itself in the same moment is no error.
        answer = call(["scancel", job_id], timeout_s=self._timeout_s)
        if answer.returncode and "already completing or completed" not in answer.stderr and not _is_gone(answer):
            raise QueueError(_refusal(answer))

    def _squeue(self, wanted: list[str]) -> dict[str, JobView]:
        # Not --json: 22.05 then ignores --jobs and prints the jobs of everybody, and some clusters lack the plugin.
        # --states=all: a job that has ended stays known for a while (MinJobAge), with how it ended.
        fields = ",".join(f"{name}:|" for name in _FIELDS)
        answer = call(
            ["squeue", "--noheader", "--all", "--array", "--states=all", f"--jobs={','.join(wanted)}", "-O", fields],
            timeout_s=self._timeout_s,
        )
        if answer.returncode and not _is_gone(answer):
            raise QueueError(_refusal(answer))
        return _named(wanted, parse_squeue(answer.stdout))

    def _sacct(self, wanted: list[str]) -> dict[str, JobView]:
        # slurmctld forgets a job MinJobAge seconds (300 by default) after its end; only accounting keeps it.
        if not wanted or shutil.which("sacct") is None:
            return {}
        try:
            answer = call(
                [
                    "sacct",
                    "--noheader",
                    "--parsable2",
                    "--allocations",
                    "--starttime=1970-01-01",
                    f"--jobs={','.join(wanted)}",
                    f"--format={','.join(_SACCT_FIELDS)}",
                ],
                timeout_s=self._timeout_s,
            )
        except QueueError:
            return {}
        # Without accounting, or with its database down, a purged job is as unknown as it was.
        return {} if answer.returncode else _named(wanted, parse_sacct(answer.stdout))


def call(command: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, with its output as its defaults make it and times in seconds.

    Raises
    ------
    QueueError
        The command is not on this machine, or did not end in time.
    """
    # A user's SQUEUE_STATES or SACCT_FORMAT would change the answers, and a locale the dates and error messages.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    environ = kept | {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
    try:
        return subprocess.run(
            list(command),
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise QueueError(
            f"slurmctld does not answer ({command[0]} was given {timeout_s:g} s); jobs keep running without it"
        ) from error
    except OSError as error:
        raise QueueError(f"cannot run {command[0]} here ({error.strerror}); ask on a node of the cluster") from error


def parse_squeue(text: str) -> list[tuple[str, JobView]]:
    """Return the jobs of ``squeue -O`` with the fields above, each with its other name (``12_3`` of an array)."""
    jobs = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split("|")]
        if len(values) != len(_FIELDS) + 1:  # a site's banner, or a name with a "|" in it
            continue
        job_id, array_id, state, reason, restarts, start, end, nodes, status = values[:-1]
        view = JobView(
            job_id=job_id,
            state=state,
            # A cancelled job keeps the reason for which it waited before.
            reason="" if reason == "None" or state == "CANCELLED" else reason,
            restarts=_number(restarts),
            start_time=_number(start),
            end_time=_number(end),
            nodes=nodes,
        )
        # squeue prints the raw wait status: exit code times 256, or the number of a signal.
        if view.is_over and (number := _number(status)) is not None:
            view = replace(view, exit_code=number >> 8 if number >> 8 else 128 + (number & 127) if number else 0)
        jobs.append((array_id, view))
    return jobs


def parse_sacct(text: str) -> list[tuple[str, JobView]]:
    """Return the jobs of ``sacct --parsable2`` with the fields above; of a requeued job its last start."""
    jobs = []
    for line in text.splitlines():
        values = line.split("|")
        if len(values) != len(_SACCT_FIELDS):
            continue
        job_id, array_id, state, start, end, nodes, status = values
        word, _, by = state.partition(" ")  # "CANCELLED by 1000"
        code, _, signal = status.partition(":")
        numbers = (_number(code), _number(signal))
        view = JobView(
            job_id=job_id,
            state=word,
            reason=by,
            start_time=_number(start),
            end_time=_number(end),
            nodes="" if nodes == "None assigned" else nodes,
        )
        # sacct prints "code:signal".
        if view.is_over and numbers[0] is not None:
            view = replace(view, exit_code=128 + numbers[1] if numbers[1] and not numbers[0] else numbers[0])
        jobs.append((array_id, view))
    return jobs


def _named(wanted: Sequence[str], jobs: list[tuple[str, JobView]]) -> dict[str, JobView]:
    """Return the jobs under the names that were asked for."""
    # A task of an array has two ids, 12_3 and one of its own; the batch script knows the latter.
    names = set(wanted)
    return {name: replace(view, job_id=name) for other, view in jobs for name in (view.job_id, other) if name in names}


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _is_gone(answer: subprocess.CompletedProcess[str]) -> bool:
    return "Invalid job id specified" in answer.stderr


def _refusal(answer: subprocess.CompletedProcess[str]) -> str:
    message = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
    if re.search(r"Unable to contact slurm controller|timed out|Connection refused", message):
        return f"slurmctld does not answer ({message}); jobs keep running without it"
    return f"SLURM refuses: {message}"
