"""One run, one owner: who may start ranks in a run directory, and how that is known. No torch: both sides use it.

Whoever starts ranks (a launcher; rank 0 where torchrun was started by hand) holds ``launch.lock`` from before it
prepares the run until its ranks have ended. The kernel drops the lock with its holder, however that dies. Where a
shared file system does not pass locks between hosts, the holder's sign of life stands in: it touches the file.
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

#: Seconds between two signs of life of a holder, and the silence after which one on another host counts as dead.
TOUCH_S, SILENCE_S = 5.0, 30.0
#: Longest wait for an earlier life of the same job, or for ranks whose launcher died, to save and leave.
PATIENCE_S = 180.0
#: What a stop file says that is written for those whom :func:`hold_launch` and :func:`hold_ranks` wait for.
LEAVE = "another start of this run waits for this one to leave"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes
    ----------
    host : str
        Its machine.
    pid, started : int
        The process and when it began (clock ticks since boot), so that a reused pid is not taken for it.
    job_id : str or None
        The SLURM job it belongs to.
    life : int
        How often SLURM had started that job again.
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
        """Return who wrote itself into the lock file; None where nobody did, or let go of it."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None where it is on another host."""
        if self.host != socket.gethostname():
            return None
        return process_started(self.pid) == self.started is not None

    def is_earlier_life_of(self, other: Holder) -> bool:
        """Whether ``other`` is the same SLURM job, started again after this life was given up."""
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
        Who, where it has said so.
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
    """A lock file that this process holds, until it lets go of it or ends.

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
        # A thread of its own: a launcher that waits for its ranks, or a rank in a long collective, still holds the run.
        threading.Thread(target=self._touch, daemon=True, name="hold").start()

    def _refuse_silent_lock(self, run: RunDirectory) -> None:
        """Refuse, or wait out, a holder whose lock this file system did not show."""
        holder = Holder.read(self._path)
        if holder is None or (holder.host, holder.pid) == (socket.gethostname(), os.getpid()):
            return
        while (alive := holder.is_alive()) is None:
            touched = self._path.stat().st_mtime
            # Ages are taken on the file system's clock: two hosts' own may differ.
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
            with contextlib.suppress(OSError):  # a file system that is away for a moment: the lock itself stands
                os.utime(self._path)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._write("")
        self._file.close()


def _now(directory: Path) -> float:
    """Return the time by the clock that stamps files in ``directory``."""
    probe = directory / f".now-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def hold_launch(run: RunDirectory, *, say: Callable[[str], None] = lambda text: None) -> Hold:
    """Become the owner of a run: nobody else starts ranks in it until the hold is released or this process ends.

    An earlier life of the same SLURM job, whose node SLURM took for dead, is asked to stop and waited for.

    Raises
    ------
    HeldError
        Another process is the owner.
    """
    return _hold(run, run.launch_lock_file, say=say, may_wait=lambda holder: holder.is_earlier_life_of(Holder.here()))


def hold_ranks(run: RunDirectory, *, say: Callable[[str], None] = lambda text: None) -> Hold:
    """Hold the run as its rank 0. Its owner calls this: who else holds it has lost its launcher, and is waited for.

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
    """Write the stop file, unless somebody has asked already; return whether it is ours."""
    try:
        with run.stop_file.open("x", encoding="utf-8") as stream:
            stream.write(f"{reason}\n")
    except FileExistsError:
        return False
    return True


def withdraw_stop(run: RunDirectory, *reasons: str) -> None:
    """Remove the stop file where it gives one of these reasons; a person's stays."""
    try:
        written = run.stop_file.read_text(encoding="utf-8")
    except OSError:
        return
    if written.startswith(reasons):
        run.stop_file.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(run: RunDirectory) -> Iterator[None]:
    """Own a run that nobody runs, for the length of the ``with`` block.

    Raises
    ------
    HeldError
        It is running, or being started.
    """
    launch = hold_launch(run)
    try:
        ranks = Hold(run, run.lock_file)
        try:
            yield
        finally:
            ranks.release()
    finally:
        launch.release()
