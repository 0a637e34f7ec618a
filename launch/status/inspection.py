"""Look at runs as they are now: their files, the scheduler, and what follows from both. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from anemoi_dist.errors import PreflightError
from anemoi_dist.run.directory import RunDirectory

from . import journal
from .derive import derive
from .files import Facts, gather
from .run_status import RunStatus
from .slurm_queue import JobView, Queue, QueueError, SlurmQueue

#: Seconds between two readings of the files, and between two questions to the scheduler, which serves many.
_READ_S, _ASK_S = 2.0, 15.0


def all_runs(root: Path) -> list[RunDirectory]:
    """Return the runs below ``root``, which need not exist."""
    if not root.is_dir():
        return []
    return [RunDirectory(path) for path in root.iterdir() if RunDirectory(path).config_file.is_file()]


def inspect_runs(facts: Sequence[Facts], *, queue: Queue) -> list[RunStatus]:
    """Return what runs are doing; the scheduler is asked once for all, and not about those that have ended."""
    views, error = _ask(queue, [run for run in facts if not _is_settled(run)])
    now = time.time()
    return [derive(run, now=now, job=views.get(run.job_id or ""), queue_error=error) for run in facts]


def inspect_run(run: RunDirectory, *, queue: Queue | None = None) -> RunStatus:
    """Return what one run is doing."""
    facts = gather(run)
    views, error = _ask(SlurmQueue() if queue is None else queue, [facts])
    return derive(facts, now=time.time(), job=views.get(facts.job_id or ""), queue_error=error)


def _ask(queue: Queue, facts: Sequence[Facts]) -> tuple[dict[str, JobView], str]:
    """Return what the scheduler says of the jobs of runs, or why it says nothing."""
    job_ids = [run.job_id for run in facts if run.job_id]
    try:
        return (queue.views(job_ids) if job_ids else {}), ""
    except QueueError as error:
        return {}, str(error)


def _is_settled(facts: Facts) -> bool:
    """Whether the run has done its work, so that no scheduler need be asked; after any other end SLURM may go on."""
    return bool(facts.launch) and facts.launch[-1].event == "end" and facts.launch[-1].code == 0


def follow(
    run: RunDirectory, *, queue: Queue | None = None, read_s: float = _READ_S, ask_s: float = _ASK_S
) -> Iterator[RunStatus]:
    """Yield what a run is doing, again and again; the last time when it has ended.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    queue : Queue, optional
        Whom to ask; SLURM by default.
    read_s, ask_s : float, optional
        Seconds between two readings of the files, and between two questions to the scheduler.
    """
    queue = SlurmQueue() if queue is None else queue
    views: dict[str, JobView] = {}
    error, asked_at, known = "", -ask_s, -1
    while True:
        facts, now = gather(run), time.monotonic()
        # What the control side has just written makes the scheduler's last answer an old one.
        if now - asked_at >= ask_s or len(facts.launch) != known:
            (views, error), asked_at, known = _ask(queue, [facts]), now, len(facts.launch)
        status = derive(facts, now=time.time(), job=views.get(facts.job_id or ""), queue_error=error)
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
