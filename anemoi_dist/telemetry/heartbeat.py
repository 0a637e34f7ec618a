"""Heartbeats: one small file per rank, written by a background thread. No torch.

The training thread only sets a few attributes (:func:`beat`), so a step never waits for the file system. The file
carries the time of the last :func:`beat`, not of the write: a training thread that is stuck looks silent although the
background thread still runs.
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
from dataclasses import dataclass, replace
from pathlib import Path

from anemoi_dist.process.output import LOSSES
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.records import from_json, number, to_json, whole

#: Phases that a rank reports. Reading data belongs to the step that waits for it.
PHASES = ("startup", "step", "validation", "checkpoint", "end")
_INTERVAL_S = 2.0
#: Limit on the writes of all ranks together: thousands of ranks would otherwise load the metadata server of a shared
#: file system.
_FILES_PER_S = 250.0


@dataclass(frozen=True, kw_only=True)
class HeartbeatRecord:
    """Content of one heartbeat file; None for what it does not say.

    Attributes
    ----------
    rank, attempt : int
        Whose heartbeat it is.
    time : float
        Unix seconds of the training thread's last sign of life, by the rank's own clock.
    host, pid : str, int
        The process.
    step : int
        Optimizer steps done.
    phase : str
        One of :data:`PHASES`.
    collectives : int
        Collective operations begun.
    total_steps, loss, samples_per_s, eta_s : int, float
        Progress; rank 0 alone reports it.
    stalled : bool
        The rank's watchdog has found its training thread silent for longer than ``watchdog.timeout_s``.
    watchdog_time : float
        Unix seconds at which the watchdog of a stalled rank last ran; the key in the file is ``seen``.
    where : str
        The innermost calls of a stalled training thread.
    """

    rank: int = 0
    attempt: int = 0
    time: float = 0.0
    host: str = ""
    pid: int | None = None
    step: int | None = None
    phase: str = ""
    collectives: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    stalled: bool | None = None
    watchdog_time: float | None = None
    where: str | None = None


class Heartbeat:
    """The heartbeat of one rank during one attempt.

    Parameters
    ----------
    run : RunDirectory
        An existing run.
    rank, world_size, attempt : int
        Rank, number of ranks, attempt number.
    num_collectives : Callable[[], int], optional
        Number of collective operations this rank has begun. If ranks wait for each other, the rank that all others
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
        self._record = HeartbeatRecord(rank=rank, attempt=attempt, host=socket.gethostname(), pid=os.getpid())
        self._num_collectives = num_collectives
        self.interval_s = max(_INTERVAL_S, world_size / _FILES_PER_S) if interval_s is None else interval_s
        self._owner = threading.get_ident()
        self.phase, self.step = "startup", 0
        self._has_begun = False
        #: Called once, by the training thread, when it leaves phase ``startup``.
        self.on_begin: Callable[[], None] = lambda: None
        self._num_helped = self._num_followed = 0
        # Silence is measured on the monotonic clock: an NTP step of the wall clock must not look like a hang. The file
        # needs the wall clock, because other hosts read it.
        self._last, self._last_wall = time.monotonic(), time.time()
        self._closed = threading.Event()
        # The watchdog thread writes too, through the same temporary file.
        self._writing = threading.Lock()
        # Daemon: a write that hangs on a dead file system must not keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._write_on, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first file and keep writing; :func:`beat` addresses this object from now on."""
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
        # A thread that is still alive hangs inside a write and holds the lock: another write would wait for ever.
        if not self._thread.is_alive():
            self.write()

    def beat(self, phase: str | None = None, *, step: int | None = None) -> None:
        """Report progress. Calls from other threads count only through :meth:`follow`."""
        # A helper thread that works while the training thread is stuck must not hide the hang.
        if threading.get_ident() != self._owner:
            self._num_helped += 1
            return
        begins = False
        if phase is not None:
            # Between two phases of a rank that has begun to train it works for its next step; it does not start again.
            begins = phase != "startup" and not self._has_begun
            self._has_begun = self._has_begun or begins
            self.phase = "step" if self._has_begun and phase == "startup" else phase
        if step is not None:
            self.step = step
        self._last, self._last_wall = time.monotonic(), time.time()
        if begins and self._thread.is_alive():
            # At once, and only now: others judge a rank that is stuck in its first step by the limit of a step.
            self.write()
            self.on_begin()

    def follow(self) -> None:
        """Count the progress of helper threads since the last call as the caller's, who waits for them."""
        if self._num_helped != self._num_followed:
            self._num_followed = self._num_helped
            self.beat()

    def note(self, **fields: float | None) -> None:
        """Set progress fields of :class:`HeartbeatRecord`."""
        # JSON has no NaN: Python would write a bare NaN, which other parsers refuse together with the whole file.
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in fields.items()}
        self._record = replace(self._record, **finite)  # type: ignore[arg-type]

    def silent_s(self) -> float:
        """Return the seconds since the last sign of life."""
        return time.monotonic() - self._last

    def write(self, **stalled: object) -> None:
        """Replace the file, with further fields of :class:`HeartbeatRecord` from a watchdog."""
        with self._writing:
            record = replace(
                self._record,
                time=round(self._last_wall, 3),
                step=self.step,
                phase=self.phase,
                collectives=self._num_collectives(),
            )
            content = to_json(replace(record, **stalled))  # type: ignore[arg-type]
            try:
                # Renamed, so that no reader sees half a file; not synced, since nobody needs it after a power cut.
                self._temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
                self._temporary.replace(self._path)
            except OSError as error:  # readers see an old time
                LOSSES.note("the heartbeat", error)
            else:
                LOSSES.end("the heartbeat")

    def _write_on(self) -> None:
        written = self._last
        while not self._closed.wait(self.interval_s):
            # An unchanged file costs nothing: a rank without progress is silent anyway.
            if self._last != written:
                written = self._last
                self.write()


_current: Heartbeat | None = None


def beat(phase: str | None = None, *, step: int | None = None) -> None:
    """Report that this rank makes progress; without a started :class:`Heartbeat`, do nothing.

    It takes about a microsecond, so call it wherever work is done.

    Parameters
    ----------
    phase : str, optional
        One of :data:`PHASES`, if it changes.
    step : int, optional
        Optimizer steps done, if that changes.
    """
    if _current is not None:
        _current.beat(phase, step=step)


def follow() -> None:
    """Count the progress of helper threads as the caller's; to be called now and then while waiting for them."""
    if _current is not None:
        _current.follow()


def note(**fields: float | None) -> None:
    """Set progress fields of this rank's :class:`HeartbeatRecord`."""
    if _current is not None:
        _current.note(**fields)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Report ``phase`` inside the ``with`` block, and the former phase again after it."""
    former = _current.phase if _current is not None else "startup"
    beat(phase)
    try:
        yield
    finally:
        beat(former)


def parse_heartbeat(text: str | bytes) -> HeartbeatRecord | None:
    """Decode a heartbeat file; None if it is torn, or rank, attempt or time is missing."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    required = whole(content.get("rank")), whole(content.get("attempt")), number(content.get("time"))
    return None if None in required else from_json(HeartbeatRecord, content)


def read_heartbeat(path: Path) -> HeartbeatRecord | None:
    """Return the content of a heartbeat file; None if there is none, or none that can be decoded."""
    try:
        return parse_heartbeat(path.read_bytes())
    except OSError:
        return None


def read_heartbeats(run: RunDirectory, *, attempt: int) -> dict[int, HeartbeatRecord]:
    """Return the heartbeats of one attempt by rank; files of older attempts are ignored."""
    files = sorted(run.heartbeats_dir.glob("rank-*.json"))
    found = [record for file in files if (record := read_heartbeat(file)) and record.attempt == attempt]
    return {record.rank: record for record in found}


def clear_beyond(run: RunDirectory, *, world_size: int) -> None:
    """Delete the files of ranks beyond ``world_size``; the ranks of this attempt replace the others."""
    for file in run.heartbeats_dir.glob("rank-*.json"):
        rank = file.stem.removeprefix("rank-")
        if rank.isdigit() and int(rank) >= world_size:
            file.unlink(missing_ok=True)
