"""What the control side did with a run, in ``launch.jsonl``: submitted, started, restarted, ended. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from anemoi_dist.parent import process_started
from anemoi_dist.run_directory import RunDirectory
from anemoi_dist.telemetry.events import Event, EventLog, read_events

#: ``submit``: a job went into a queue. ``launch``: a launcher began to start ranks. ``restart``: the ranks are started
#: again. ``requeue``: the job goes back into the queue. ``end``: the launcher left, with its exit code. ``cancel``: the
#: user ended the run.
EVENTS = ("submit", "launch", "restart", "requeue", "end", "cancel")


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


def read(run: RunDirectory) -> list[Event]:
    """Return the events in the order they were written; none for a run that nobody launched."""
    return read_events(run.launch_file)


def last(events: Sequence[Event], *names: str) -> Event | None:
    """Return the newest of the events so named."""
    return next((event for event in reversed(events) if event["event"] in names), None)
