"""Inspect runs: read their files, ask the scheduler about their jobs, derive their status. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from anemoi_dist.errors import PreflightError
from anemoi_dist.run.directory import RunDirectory

from . import journal
from .derive import derive
from .files import Facts, gather
from .run_status import RunStatus
from .slurm_queue import JobView, QueueError, SlurmQueue

#: Seconds between two readings of the files, and between two questions to the scheduler, which serves many.
_READ_S, _ASK_S = 2.0, 15.0


def all_runs(root: Path) -> list[RunDirectory]:
    """Return the runs below ``root``, which need not exist."""
    if not root.is_dir():
        return []
    return [RunDirectory(path) for path in root.iterdir() if RunDirectory(path).config_file.is_file()]


def inspect_runs(facts: Sequence[Facts]) -> list[RunStatus]:
    """Return what runs are doing; the scheduler is asked once for all, and not about those that have ended."""
    views, error = _ask([run for run in facts if not _is_settled(run)])
    return [_status(run, views, error) for run in facts]


def inspect_run(run: RunDirectory) -> RunStatus:
    """Return what one run is doing."""
    facts = gather(run)
    return _status(facts, *_ask([facts]))


def _ask(facts: Sequence[Facts]) -> tuple[dict[str, JobView], str]:
    """Return the scheduler's view of the jobs of runs, or why it does not answer."""
    # Most runs never were in a queue: then no scheduler is asked, and none need be there.
    job_ids = [run.job_id for run in facts if run.job_id]
    try:
        return (SlurmQueue().views(job_ids) if job_ids else {}), ""
    except QueueError as error:
        return {}, str(error)


def _status(facts: Facts, views: Mapping[str, JobView], error: str) -> RunStatus:
    return derive(facts, now=time.time(), job=views.get(facts.job_id or ""), queue_error=error)


def _is_settled(facts: Facts) -> bool:
    """Whether the run has done its work, so that no scheduler need be asked; after any other end SLURM may requeue."""
    return bool(facts.launch) and facts.launch[-1].event == "end" and facts.launch[-1].code == 0


def follow(run: RunDirectory, *, read_s: float = _READ_S, ask_s: float = _ASK_S) -> Iterator[RunStatus]:
    """Yield what a run is doing, again and again; the last time when it has ended.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    read_s, ask_s : float, optional
        Seconds between two readings of the files, and between two questions to the scheduler.
    """
    answer: tuple[dict[str, JobView], str] = {}, ""
    asked_at, known = -ask_s, -1
    while True:
        facts, now = gather(run), time.monotonic()
        # An entry that the control side has just written makes the scheduler's last answer an old one.
        if now - asked_at >= ask_s or len(facts.launch) != known:
            answer, asked_at, known = _ask([facts]), now, len(facts.launch)
        status = _status(facts, *answer)
        yield status
        if not status.may_go_on:
            return
        time.sleep(read_s)


def refuse_queued(run: RunDirectory) -> None:
    """Raise where SLURM has a job of this run.

    Raises
    ------
    PreflightError
        There is one, or SLURM, which was given one, does not answer.
    """
    submitted = journal.last(journal.read(run), "submit")
    if submitted is None:
        return
    view = SlurmQueue().view(str(submitted.job_id))
    if not view.is_over:
        where = f" on {view.nodes}" if view.nodes else f" ({view.reason})" if view.reason else ""
        raise PreflightError(
            f"run {run.run_id} is job {view.job_id} already, which is {view.state}{where}; wait for it, "
            f"`anemoi-dist cancel {run.run_id}`, or take another run.id"
        )
