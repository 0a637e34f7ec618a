"""Signs of life: one small file a rank, written by a thread from the progress of the training thread. No torch.

The training thread only sets a few attributes (:func:`beat`); a thread writes them. So a step pays no file system, and
a training thread that is stuck goes silent, for the time in the file is that of its last sign of life.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anemoi_dist.run.directory import RunDirectory

#: What a rank says it is in. Reading data belongs to the step that waits for it.
PHASES = ("startup", "step", "validation", "checkpoint", "end")
_INTERVAL_S = 2.0
#: Files that all ranks together may write in a second: a file system's metadata server has other things to do.
_FILES_PER_S = 250.0


class Heartbeat:
    """What one rank tells of itself during one attempt.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    rank, world_size, attempt : int
        Who this is.
    num_collectives : Callable[[], int], optional
        How many collective operations this rank has begun. Where ranks wait for each other, the one that all others
        wait for has begun the fewest.
    interval_s : float, optional
        Seconds between two writes; by default 2, and more from 500 ranks on.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        num_collectives: Callable[[], int] = lambda: 0,
        interval_s: float | None = None,
    ) -> None:
        self._path = run.heartbeat_file(rank)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "attempt": attempt}
        self._num_collectives = num_collectives
        self.interval_s = max(_INTERVAL_S, world_size / _FILES_PER_S) if interval_s is None else interval_s
        self._owner = threading.get_ident()
        self.phase, self.step = "startup", 0
        self._fields: dict[str, Any] = {}
        self._num_helped = self._num_followed = 0
        self._last, self._last_wall = time.monotonic(), time.time()
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._write_on, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first file and keep writing; :func:`beat` means this object from now on."""
        global _current
        self.write()
        self._thread.start()
        _current = self

    def close(self) -> None:
        """Write the last file, in phase ``end``, and stop."""
        global _current
        if _current is self:
            _current = None
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)  # a file system that hangs must not hold up the end
        self.beat("end")
        if not self._thread.is_alive():
            self.write()

    def beat(self, phase: str | None = None, *, step: int | None = None) -> None:
        """Note that this rank goes on. Only the training thread's word counts; others' is heard by :meth:`follow`."""
        if threading.get_ident() != self._owner:
            self._num_helped += 1
            return
        if phase is not None:
            self.phase = phase
        if step is not None:
            self.step = step
        self._last, self._last_wall = time.monotonic(), time.time()

    def follow(self) -> None:
        """Take the progress that helping threads have made since the last call for the caller's, who waits for them."""
        if self._num_helped != self._num_followed:
            self._num_followed = self._num_helped
            self.beat()

    def note(self, **fields: Any) -> None:
        """Add to what the file says."""
        self._fields = {**self._fields, **fields}

    def silent_s(self) -> float:
        """Return the seconds since the last sign of life."""
        return time.monotonic() - self._last

    def content(self) -> dict[str, Any]:
        """Return what the file says now."""
        return {
            **self._who,
            "time": round(self._last_wall, 3),
            "step": self.step,
            "phase": self.phase,
            "collectives": self._num_collectives(),
            **{key: _finite(value) for key, value in self._fields.items()},
        }

    def write(self, **more: Any) -> None:
        """Replace the file, at once and without waiting for the disk: nobody needs it after a power cut."""
        with self._writing:
            try:
                self._temporary.write_text(json.dumps({**self.content(), **more}) + "\n", encoding="utf-8")
                self._temporary.replace(self._path)
            except OSError:
                return  # a full disk is no reason to end a run; whoever reads sees an old time

    def _write_on(self) -> None:
        written = self._last
        while not self._closed.wait(self.interval_s):
            if self._last != written:
                written = self._last
                self.write()


def _finite(value: Any) -> Any:
    """Return ``value``, or None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_current: Heartbeat | None = None


def beat(phase: str | None = None, *, step: int | None = None) -> None:
    """Note that this rank goes on; nothing where nobody listens. About a microsecond: call it wherever work is done.

    Parameters
    ----------
    phase : str, optional
        One of :data:`PHASES`, where it changes.
    step : int, optional
        Optimizer steps done, where they change.
    """
    if _current is not None:
        _current.beat(phase, step=step)


def follow() -> None:
    """Call this now and then while waiting for a thread of this process: its progress then counts as the caller's."""
    if _current is not None:
        _current.follow()


def note(**fields: Any) -> None:
    """Add to what this rank's file says."""
    if _current is not None:
        _current.note(**fields)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Be in ``phase`` inside the ``with`` block, and back in the former one after it."""
    former = _current.phase if _current is not None else "startup"
    beat(phase)
    try:
        yield
    finally:
        beat(former)


def read_heartbeat(path: Path) -> dict[str, Any] | None:
    """Return what a heartbeat file says; None where there is none, or none that makes sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        int(content["rank"]), int(content["attempt"]), float(content["time"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return content


def read_heartbeats(run: RunDirectory, *, attempt: int) -> dict[int, dict[str, Any]]:
    """Return the heartbeats of one attempt by rank; what older attempts left behind is passed over."""
    files = sorted(run.heartbeats_dir.glob("rank-*.json"))
    found = [content for file in files if (content := read_heartbeat(file)) and content["attempt"] == attempt]
    return {content["rank"]: content for content in found}


def clear_beyond(run: RunDirectory, *, world_size: int) -> None:
    """Delete the files of ranks that this attempt does not have; it replaces the others."""
    for file in run.heartbeats_dir.glob("rank-*.json"):
        number = file.stem.removeprefix("rank-")
        if number.isdigit() and int(number) >= world_size:
            file.unlink(missing_ok=True)
