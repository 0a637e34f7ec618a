"""The event log of a run: one JSON object a line, appended by rank 0, read by reports and the control side."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from anemoi_dist.process.output import LOSSES, AppendedFile

Event = dict[str, Any]


class EventLog:
    """Appends events to a file, each with a single write, so that only the last line can be torn.

    Parameters
    ----------
    path : Path
        ``events.jsonl`` of a run. A torn last line of a killed process is ended with a newline, or the first new event
        would become part of it.
    clock : Callable[[], float], optional
        Seconds since 1970-01-01 UTC.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = AppendedFile(str(path), path=path)
        self._last_step, self._was_written = 0, False

    def write(self, name: str, *, step: int, **fields: Any) -> Event:
        """Append one event and return it as written.

        Parameters
        ----------
        name : str
            ``start``, ``step``, ``validation``, ...
        step : int
            Optimizer steps done.
        **fields : Any
            Numbers, strings, lists and dictionaries; NumPy scalars and 0-d tensors become numbers. NaN and infinity,
            which JSON does not have, become null.

        An event that cannot be written, on a full disk, is counted; a later event, ``lost``, says how many were.
        """
        event = self._append(name, step, fields)
        self._report_losses(step=step)
        self._last_step = step
        return event

    def close(self) -> None:
        """Record what is lost for good and close the file; a second call does nothing."""
        self._report_losses(step=self._last_step, failing=True)
        self._file.close()

    def _append(self, name: str, step: int, fields: Mapping[str, Any]) -> Event:
        event = {"event": name, "time": round(self._clock(), 3), "step": step, **plain(fields)}
        line = json.dumps(event, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._was_written = self._file.append(line)
        return event

    def _report_losses(self, *, step: int, failing: bool = False) -> None:
        """Record how much of the process's output is lost, as soon as its destination works again."""
        if not self._was_written or not (losses := LOSSES.take(failing=failing)):
            return
        self._append("lost", step, {"output": losses})
        if not self._was_written:
            LOSSES.put_back(losses)


def plain(value: Any) -> Any:
    """Convert ``value`` to types that JSON has; a number that is not finite becomes None.

    Raises
    ------
    TypeError
        ``value`` is or contains an object of another type than :meth:`EventLog.write` names.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"an event cannot hold a {type(value).__name__}: {value!r}")


def read_events(path: Path) -> list[Event]:
    """Return the events of a file in the order they were written; an empty list if there is no file.

    A line that is not a complete event is skipped: a process that was killed while writing leaves one.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    events = []
    for line in text.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("step"), int):
            events.append(event)
    return events


def latest_by_step(events: Iterable[Event], name: str, **fields: Any) -> dict[int, Event]:
    """Return the events called ``name``, by step in ascending order, as the run stands now.

    A run that resumed went back to a checkpoint and repeats some steps: the last event of a step wins, and what an
    earlier attempt recorded beyond the step it resumed from counts no more, even where the new attempt is not there
    yet.

    Parameters
    ----------
    events : Iterable[Event]
        In the order they were written, ``start`` events included.
    name : str
        Name of the events wanted.
    **fields : Any
        Values that an event must have, such as ``split="test"``.
    """
    found: dict[int, Event] = {}
    for event in events:
        # An attempt that resumes from an earlier step does the later ones again: what it replaces must not count.
        if event["event"] == "start":
            resumed_from = event.get("resumed_from_step") or 0
            found = {step: old for step, old in found.items() if step <= resumed_from}
        if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
            found[event["step"]] = event
    return dict(sorted(found.items()))
