"""What the control side did with a run, in ``launch.jsonl``: submitted, started, restarted, ended. No torch."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from anemoi_dist.process.parent_death import process_started
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import Event, EventLog, read_events

#: ``submit``: a job went into a queue. ``launch``: a launcher began to start ranks. ``restart``: the ranks are started
#: again. ``requeue``: the job goes back into the queue. ``end``: the launcher left, with its exit code. ``stop``: the
#: user asked it to save and stop. ``cancel``: the user ended it.
EVENTS = ("submit", "launch", "restart", "requeue", "end", "stop", "cancel")


def note(run: RunDirectory, event: str, *, step: int = 0, **fields: Any) -> Event:
    """Append one of :data:`EVENTS`; every line says which process wrote it, by host, pid and start (clock ticks).

    Parameters
    ----------
    run : RunDirectory
        It exists.
    event : str
        One of :data:`EVENTS`.
    step : int, optional
        Optimizer steps done, where it is known.
    **fields : Any
        What belongs to the event, such as ``job_id``, ``code``, ``reason``.
    """
    if event not in EVENTS:
        raise ValueError(f"event {event!r} is not one of {', '.join(EVENTS)}")
    log = EventLog(run.launch_file)
    try:
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_started(os.getpid())}
        return log.write(event, step=step, **writer, **fields)
    finally:
        log.close()


def note_if_possible(run: RunDirectory, event: str, **fields: Any) -> None:
    """Append an event, or say why not and go on: a full disk is no reason to leave ranks alone."""
    try:
        note(run, event, **fields)
    except OSError as error:
        print(f"{run.launch_file} cannot be written: {error}", file=sys.stderr, flush=True)  # noqa: T201


def read(run: RunDirectory) -> list[Event]:
    """Return the events in the order they were written; none for a run that nobody launched."""
    return read_events(run.launch_file)


def last(events: Sequence[Event], *names: str) -> Event | None:
    """Return the newest of the events so named."""
    return next((event for event in reversed(events) if event["event"] in names), None)
