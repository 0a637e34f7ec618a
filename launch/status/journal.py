"""``launch.jsonl``, the journal of the control side: runs submitted, launched, restarted, ended. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anemoi_dist.process.parent_death import process_started
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog, read_events
from anemoi_dist.run.records import from_json

#: ``submit``: a job went into a queue. ``launch``: a launcher began to start ranks. ``restart``: the ranks are started
#: again. ``requeue``: the job goes back into the queue. ``end``: the launcher left, with its exit code. ``stop``: the
#: user asked it to save and stop. ``cancel``: the user ended it.
EVENTS = ("submit", "launch", "restart", "requeue", "end", "stop", "cancel")


def is_anemoi_training(command: Sequence[str] | None) -> bool:
    """Whether a command is ``anemoi-training train``, which saves on request: see ``job/anemoi_training.py``."""
    return command is not None and list(command[:2]) == ["anemoi-training", "train"]


@dataclass(frozen=True)
class Entry:
    """One line of the journal, as far as anybody reads it; a missing or damaged value is None, or empty.

    Attributes
    ----------
    event : str
        One of :data:`EVENTS`.
    time : float
        Seconds since 1970-01-01 UTC, by the clock of ``host``.
    host, pid, started : str, int, int
        The process that wrote it, and when that began (clock ticks since boot), so that a reused pid is not taken
        for it.
    kind : str
        ``local``, ``slurm`` or ``mpi``.
    job_id, life : str, int
        The SLURM job, and how often SLURM had requeued it.
    code, reason : int, str
        How the ranks ended.
    wait_s : float
        Seconds between a ``restart`` and the start of the ranks.
    progress : bool
        Whether anything new had been saved before a ``requeue``.
    command : list[str]
        Submitted in the place of the trainer.
    """

    event: str
    time: float = 0.0
    host: str | None = None
    pid: int | None = None
    started: int | None = None
    kind: str | None = None
    job_id: str | None = None
    life: int = 0
    code: int | None = None
    reason: str = ""
    wait_s: float = 0.0
    progress: bool = False
    command: list[str] | None = None


def note(run: RunDirectory, event: str, **fields: Any) -> None:
    """Append one of :data:`EVENTS`, with the process that writes it; on a full disk it is lost, which is printed.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    event : str
        One of :data:`EVENTS`.
    **fields : Any
        Other attributes of :class:`Entry`, and what a person may want to read in the file.
    """
    if event not in EVENTS:
        raise ValueError(f"event {event!r} is not one of {', '.join(EVENTS)}")
    # Opened for one line alone: commands on several hosts append to the same file.
    log = EventLog(run.launch_file)
    try:
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_started(os.getpid())}
        log.write(event, step=0, **writer, **fields)
    finally:
        log.close()


def read(run: RunDirectory) -> list[Entry]:
    """Return the entries in the order they were written; none for a run that nobody launched."""
    entries = (from_json(Entry, event) for event in read_events(run.launch_file))
    return [entry for entry in entries if entry.event in EVENTS and entry.time]


def last(entries: Sequence[Entry], *events: str) -> Entry | None:
    """Return the newest entry of one of these events."""
    return next((entry for entry in reversed(entries) if entry.event in events), None)
