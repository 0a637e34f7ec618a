"""Ownership of a run: only its owner starts ranks in its directory. No torch: both sides use it.

The launcher, or rank 0 if torchrun was started by hand, holds ``launch.lock`` from before it prepares the run until its
ranks have ended. The kernel releases the lock when its holder dies, however it dies. Some shared file systems do not
pass locks between hosts; for them the holder also touches the file at intervals, as a sign of life.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from anemoi_dist.errors import PreflightError
from anemoi_dist.process.parent_death import process_started
from anemoi_dist.run.directory import RunDirectory

#: Seconds between two signs of life of a holder, and the seconds without one after which it counts as dead.
TOUCH_S, SILENCE_S = 5.0, 30.0
#: Longest wait for an earlier start of the same job, or for ranks whose launcher has died, to save and leave.
PATIENCE_S = 180.0
#: Content of the stop file that :func:`hold_launch` and :func:`hold_ranks` write for the holder they wait for.
LEAVE = "another start of this run waits for this one to leave"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes
    ----------
    host : str
        Its machine.
    pid, started : int
        Its pid and start (clock ticks since boot): the kernel reuses pids.
    job_id : str or None
        The SLURM job it belongs to.
    life : int
        Times that SLURM had requeued that job.
    """

    host: str
    pid: int
    started: int | None
    job_id: str | None = None
    life: int = 0

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Holder:
        """Return this process as a holder."""
        environ = os.environ if environ is None else environ
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=process_started(os.getpid()),
            job_id=environ.get("SLURM_JOB_ID"),
            life=int(environ.get("SLURM_RESTART_COUNT", "0")),
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Return the holder that a lock file names; None if it names none, or the holder has released it."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None if it is on another host."""
        if self.host != socket.gethostname():
            return None
        return process_started(self.pid) == self.started is not None

    def is_earlier_life_of(self, other: Holder) -> bool:
        """Whether ``other`` is the same SLURM job, requeued after SLURM wrongly considered this start dead."""
        return self.job_id is not None and self.job_id == other.job_id and self.life < other.life

    def __str__(self) -> str:
        job = "" if self.job_id is None else f" (SLURM job {self.job_id})"
        return f"process {self.pid} on {self.host}{job}"


class HeldError(PreflightError):
    """Another process holds the run.

    Parameters
    ----------
    run_id : str
        The run.
    holder : Holder or None
        The holder, if the lock file names it.
    """

    def __init__(self, run_id: str, holder: Holder | None) -> None:
        self.run_id, self.holder = run_id, holder
        super().__init__(
            f"run {run_id} is held by {holder or 'a process that has not said who it is'}; wait for it, stop it with "
            f"`anemoi-dist stop {run_id}`, or take another run.id"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.run_id, self.holder))


class Hold:
    """A lock file that this process holds until it releases it or ends.

    Parameters
    ----------
    run : RunDirectory
        The run, for the message of a refusal.
    path : Path
        The lock file; its directory exists.

    Raises
    ------
    HeldError
        Another process holds it.
    """

    def __init__(self, run: RunDirectory, path: Path) -> None:
        self._path = path
        self._file: IO[str] = path.open("a")
        self._ended = threading.Event()
        # flock, not lockf: a POSIX lock would go as soon as any descriptor of this process for the file is closed.
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise HeldError(run.run_id, Holder.read(path)) from error
        try:
            self._refuse_silent_lock(run)
        except BaseException:
            self._file.close()
            raise
        self._write(json.dumps(asdict(Holder.here())))
        # In a thread: a launcher that waits for its ranks, or a rank in a long collective, must not seem dead.
        threading.Thread(target=self._touch, daemon=True, name="hold").start()

    def _refuse_silent_lock(self, run: RunDirectory) -> None:
        """Refuse a living holder whose lock this file system does not show; see the module."""
        holder = Holder.read(self._path)
        if holder is None or (holder.host, holder.pid) == (socket.gethostname(), os.getpid()):
            return
        while (alive := holder.is_alive()) is None:
            touched = self._path.stat().st_mtime
            # The age is taken on the file system's clock: the clocks of two hosts may differ.
            if _now(self._path.parent) - touched > SILENCE_S:
                return
            time.sleep(TOUCH_S / 4)
            if self._path.stat().st_mtime != touched:
                raise HeldError(run.run_id, holder)
        if alive:
            raise HeldError(run.run_id, holder)

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_S):
            with contextlib.suppress(OSError):  # the file system is away for a moment: the lock itself remains
                os.utime(self._path)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        # The process is going to end, and the lock with it: the name that stays is that of nobody who lives.
        with contextlib.suppress(OSError):
            self._write("")
        with contextlib.suppress(OSError):
            self._file.close()


def _now(directory: Path) -> float:
    """Return the time by the clock that stamps files in ``directory``."""
    stamped = directory / f".now-{socket.gethostname()}-{os.getpid()}"
    try:
        stamped.touch()
        return stamped.stat().st_mtime
    finally:
        stamped.unlink(missing_ok=True)


def hold_launch(run: RunDirectory, *, say: Callable[[str], None] = lambda text: None) -> Hold:
    """Become the owner of a run: nobody else starts ranks in it until the hold is released or this process ends.

    An earlier start of the same SLURM job may still run on a node that SLURM wrongly considered dead; it is asked to
    stop and waited for.

    Raises
    ------
    HeldError
        Another process is the owner.
    """
    return _hold(run, run.launch_lock_file, say=say, may_wait=lambda holder: holder.is_earlier_life_of(Holder.here()))


def hold_ranks(run: RunDirectory, *, say: Callable[[str], None] = lambda text: None) -> Hold:
    """Hold the run as its rank 0. The owner calls this, so another holder has lost its launcher, and is waited for.

    Raises
    ------
    HeldError
        The other ranks have not left in time.
    """
    return _hold(run, run.lock_file, say=say, may_wait=lambda holder: True)


def _hold(run: RunDirectory, path: Path, *, say: Callable[[str], None], may_wait: Callable[[Holder], bool]) -> Hold:
    deadline, asked = time.monotonic() + PATIENCE_S, False
    try:
        while True:
            try:
                return Hold(run, path)
            except HeldError as error:
                if error.holder is None or not may_wait(error.holder) or time.monotonic() > deadline:
                    raise
                if not asked:
                    say(
                        f"run {run.run_id}: {error.holder} is left from an earlier start; asked to save and leave, "
                        "waiting"
                    )
                    ask_to_stop(run, LEAVE)
                    asked = True
                time.sleep(0.2)
    finally:
        if asked:
            withdraw_stop(run, LEAVE)


def ask_to_stop(run: RunDirectory, reason: str) -> bool:
    """Write the stop file unless it exists; return whether this call has written it."""
    try:
        with run.stop_file.open("x", encoding="utf-8") as stream:
            stream.write(f"{reason}\n")
    except FileExistsError:
        return False
    return True


def withdraw_stop(run: RunDirectory, *reasons: str) -> None:
    """Remove the stop file if its reason is one of these; that of a person stays."""
    try:
        written = run.stop_file.read_text(encoding="utf-8")
    except OSError:
        return
    if written.startswith(reasons):
        run.stop_file.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(run: RunDirectory) -> Iterator[None]:
    """Own a run for the duration of the ``with`` block.

    Raises
    ------
    HeldError
        The run is running, or being started.
    """
    # Both locks: ranks whose launcher has died hold only theirs.
    launch = hold_launch(run)
    try:
        ranks = Hold(run, run.lock_file)
        try:
            yield
        finally:
            ranks.release()
    finally:
        launch.release()
