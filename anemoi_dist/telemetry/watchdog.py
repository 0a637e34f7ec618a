"""Watchdog: detects that no rank makes progress, records the stacks and the rank to blame, and ends with exit code 6.

In every rank a thread checks the heartbeat of its training thread (``heartbeat.py``). If it is silent for
``watchdog.timeout_s``, the watchdog writes the stacks of all threads into the rank's log and marks the heartbeat as
stalled. The run hangs if every rank is stalled or its watchdog does not answer either; a rank that waits for another
one which still works is no hang. Rank 0 decides, or the first rank after it whose watchdog runs; it alone reads all
heartbeats.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from anemoi_dist.errors import AnemoiDistError, ExitCode, print_message
from anemoi_dist.process.deadman import Deadman
from anemoi_dist.process.output import open_log
from anemoi_dist.run.attempt import record_end
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog
from anemoi_dist.run.records import Failure, Hang, Process, to_json
from anemoi_dist.telemetry.heartbeat import Heartbeat, HeartbeatRecord, clear_beyond, read_heartbeat, read_heartbeats

#: The dead man's switch of a rank that is stuck in C code goes off this long after the watchdog would have acted: the
#: rank that decides must still find the process, to name it.
_GRACE_S = 20.0
#: With thousands of ranks, naming all of them would bury the one that matters.
_NUM_NAMED = 8


def find_hang(
    beats: Mapping[int, HeartbeatRecord],
    *,
    world_size: int,
    now: float,
    timeout_s: float,
    startup_timeout_s: float | None = None,
    margin_s: float = 0.0,
) -> Hang | None:
    """Return the rank to blame if no rank makes progress, or None while one does. Pure.

    Parameters
    ----------
    beats : Mapping[int, HeartbeatRecord]
        The heartbeats of this attempt by rank.
    world_size : int
        Number of ranks; one without a heartbeat has never got as far as writing one.
    now : float
        Unix seconds.
    timeout_s : float
        ``watchdog.timeout_s``.
    startup_timeout_s : float, optional
        The same for a rank in phase ``startup``; by default ``timeout_s``.
    margin_s : float, optional
        Further seconds of silence before a rank counts although it has not marked itself as stalled: clocks differ,
        and its watchdog runs at intervals.
    """
    # Before all others: a rank that never came has begun no collective and was never heard of.
    never = HeartbeatRecord(collectives=-1)
    ranks = {rank: beats.get(rank, never) for rank in range(world_size)}

    def limit_s(beat: HeartbeatRecord) -> float:
        is_starting = beat.phase == "startup" and startup_timeout_s is not None
        return (startup_timeout_s if is_starting else timeout_s) + margin_s  # type: ignore[operator] # not None

    if any(not beat.stalled and now - beat.time < limit_s(beat) for beat in ranks.values()):
        return None
    # Ranks begin the same collectives in the same order: whoever has begun the fewest keeps the others waiting.
    counts = {rank: beat.collectives or 0 for rank, beat in ranks.items()}
    fewest = min(counts.values())
    behind = [rank for rank, count in counts.items() if count == fewest]
    blamed = min(behind, key=lambda rank: ranks[rank].time)
    if blamed not in beats:
        return Hang(blamed, silent_s=timeout_s, behind=behind[:_NUM_NAMED])
    beat = beats[blamed]
    # Silent and not even marked as stalled: stopped, or in C code that holds the interpreter lock.
    unresponsive = [beats[rank] for rank, beat in ranks.items() if not beat.stalled and rank in beats]
    return Hang(
        blamed,
        host=beat.host,
        pid=beat.pid or 0,
        phase=beat.phase,
        step=beat.step or 0,
        silent_s=round(now - beat.time, 1),
        where=beat.where or "",
        # If all ranks have begun the same number, none has fallen behind.
        behind=behind[:_NUM_NAMED] if len(behind) < world_size else [],
        unresponsive=[Process(beat.rank, host=beat.host, pid=beat.pid or 0) for beat in unresponsive[:_NUM_NAMED]],
    )


def record_hang(run: RunDirectory, attempt: int, hang: Hang) -> None:
    """Record that an attempt ended with a hang, in ``run.json`` and as an event."""
    log_file = str(run.log_file(attempt, hang.rank))
    failure = Failure(hang.rank, host=hang.host, pid=hang.pid, error=str(hang), log=log_file, hang=hang)
    # Whoever records first decides: an attempt that ended otherwise has no hang event.
    if record_end(run, attempt, ExitCode.HANG, failure=failure) != ExitCode.HANG:
        return
    log = EventLog(run.events_file)
    log.write("hang", attempt=attempt, **to_json(hang))
    log.close()


def record_unreported_hang(run: RunDirectory) -> None:
    """Record the hang of the last attempt if none of its ranks could: one rank alone, ended by its dead man's switch.

    To be called by the process that started the ranks, after one of them ended with code 6.
    """
    attempts = run.read_state().attempts
    if not attempts or attempts[-1].exit_code is not None:
        return
    number = attempts[-1].number
    beats = read_heartbeats(run, attempt=number)
    # The ranks have ended, so all of them count as silent, whatever the clocks say.
    world_size = attempts[-1].world_size or 1
    hang = find_hang(beats, world_size=world_size, now=time.time(), timeout_s=0.0, margin_s=-math.inf)
    if hang is not None:
        record_hang(run, number, hang)


class Watchdog:
    """Watches the training thread of one rank, which is the thread that constructs it.

    Parameters
    ----------
    heartbeat : Heartbeat
        This rank's heartbeat.
    run : RunDirectory
        The run whose end is recorded.
    attempt, rank, world_size : int
        Attempt number, rank, number of ranks.
    timeout_s : float
        ``watchdog.timeout_s``.
    startup_timeout_s : float, optional
        The limit of a rank that starts; by default ``timeout_s``.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        run: RunDirectory,
        attempt: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        startup_timeout_s: float | None = None,
    ) -> None:
        self._heartbeat, self._run, self._attempt = heartbeat, run, attempt
        self._rank, self._world_size, self._running_timeout_s = rank, world_size, timeout_s
        self._startup_timeout_s = timeout_s if startup_timeout_s is None else startup_timeout_s
        self._tick_s = min(1.0, timeout_s / 10)
        self._watched = threading.get_ident()
        # A log that cannot be written must not keep a hang from being ended.
        self._log: IO[str] = open_log(run.log_file(attempt, rank))  # type: ignore[assignment]
        # Nobody else ends the run of a single rank. With several ranks, their watchdogs need the time to name this one
        # before its dead man's switch removes the process.
        grace_s = 3.0 if world_size == 1 else _GRACE_S
        self._deadman = Deadman(grace_s=grace_s, code=ExitCode.HANG, log=self._log)
        self._is_stalled, self._no_judge_since, self._seen = False, 0.0, 0.0
        self._closed = threading.Event()
        # close() must not return in the middle of a decision: the run would end after it had finished.
        self._deciding = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._rearm_deadman()
        # Without waiting for this thread, which gets no further turn where the first step never gives up the lock.
        self._heartbeat.on_begin = self._rearm_deadman
        self._thread.start()

    def close(self) -> None:
        """Stop watching. A watchdog that is about to end the run still does."""
        with self._deciding:
            self._closed.set()
        self._heartbeat.on_begin = lambda: None
        self._thread.join(timeout=10 * self._tick_s)
        self._deadman.close()
        self._log.close()

    @property
    def _timeout_s(self) -> float:
        """The limit of this rank, where it stands now."""
        return self._limit_s(self._heartbeat.phase)

    def _limit_s(self, phase: str) -> float:
        return self._startup_timeout_s if phase == "startup" else self._running_timeout_s

    def _watch(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._rearm_deadman()
            with suppress(OSError, AnemoiDistError):  # a file that cannot be read or written is tried again
                self._check()

    def _rearm_deadman(self) -> None:
        """Postpone the dead man's switch until shortly after this thread would have acted."""
        left_s = self._timeout_s - self._heartbeat.silent_s()
        self._deadman.hold((left_s if left_s > 0 else self._timeout_s) + 2 * self._tick_s)

    def _check(self) -> None:
        if self._heartbeat.silent_s() < self._timeout_s:
            self._recover()
            return
        with self._deciding:
            if not self._closed.is_set():
                self._stall()

    def _recover(self) -> None:
        if self._is_stalled:
            self._is_stalled, self._no_judge_since = False, 0.0
            # At once: as long as the file says stalled, the rank that decides counts this one as hanging.
            self._heartbeat.write()
            self._say("it continues: the run had not hung (watchdog.timeout_s is short for it)")

    def _stall(self) -> None:
        """Log the stacks of this rank once, and end the process if the run hangs."""
        if not self._is_stalled:
            self._is_stalled = True
            beat = self._heartbeat
            key = "startup_timeout_s" if beat.phase == "startup" else "timeout_s"
            self._say(
                f"no sign of life for watchdog.{key}={self._timeout_s:g} s, in phase {beat.phase} after step "
                f"{beat.step}; the stacks of all threads:"
            )
            faulthandler.dump_traceback(self._log)
        # Not at every tick: with thousands of stalled ranks the file system would be flooded when it may be the cause.
        if time.monotonic() - self._seen >= min(self._heartbeat.interval_s, self._timeout_s / 4):
            self._seen = time.monotonic()
            self._heartbeat.write(stalled=True, watchdog_time=time.time(), where=self._where())
        hang = self._recorded() or (self._judge() if self._is_judge() else None)
        if hang is None:
            return
        # The training thread may have gone on meanwhile; a hang that is recorded ends the run all the same, or the
        # other ranks would leave it alone.
        self._say(str(hang))
        kill_siblings(hang.unresponsive)
        os._exit(ExitCode.HANG)

    def _judge(self) -> Hang | None:
        """Read all heartbeats; record and return a hang if there is one."""
        beats = read_heartbeats(self._run, attempt=self._attempt)
        hang = find_hang(
            beats,
            world_size=self._world_size,
            now=time.time(),
            timeout_s=self._running_timeout_s,
            startup_timeout_s=self._startup_timeout_s,
            margin_s=3 * self._tick_s + 1.0,
        )
        if hang is None or self._heartbeat.silent_s() < self._timeout_s:
            return None
        with suppress(OSError):  # a full disk: the exit code still reports the hang
            record_hang(self._run, self._attempt, hang)
        log_file = self._run.log_file(self._attempt, hang.rank)
        print_message(f"{hang}; its stacks: {log_file}")
        return hang

    def _is_judge(self) -> bool:
        """Whether this rank decides: rank 0, or the next one if the watchdog of rank 0 is silent too."""
        if self._rank == 0:
            return True
        judge = read_heartbeat(self._run.heartbeat_file(0))
        now = time.time()
        if judge is not None and judge.attempt == self._attempt:
            # A stalled rank 0 rewrites its file as long as its watchdog runs; until it is stalled, its training thread
            # has the whole timeout.
            recent_s = max(3.0, 2 * self._heartbeat.interval_s) if judge.stalled else self._limit_s(judge.phase)
            if now - (judge.time if judge.watchdog_time is None else judge.watchdog_time) < recent_s:
                self._no_judge_since = 0.0
                return False
        self._no_judge_since = self._no_judge_since or now
        # Staggered by rank, so that the second finds what the first has recorded.
        return now - self._no_judge_since >= 0.5 * min(self._rank - 1, 30)

    def _recorded(self) -> Hang | None:
        """Return the hang that another rank has recorded, if any."""
        failure = self._run.read_state().attempts[self._attempt - 1].failure
        return None if failure is None else failure.hang

    def _where(self) -> str:
        return format_stack(sys._current_frames().get(self._watched))

    def _say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._log.write(f"{stamp} watchdog: rank {self._rank}: {text}\n")


def format_stack(frame: FrameType | None, *, depth: int = 4) -> str:
    """Return the innermost calls of a stack, the innermost first: ``model.py:12 in forward < module.py:40 in loss``."""
    calls: list[str] = []
    while frame is not None and len(calls) < depth:
        code = frame.f_code
        calls.append(f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return " < ".join(calls)


def kill_siblings(processes: list[Process]) -> None:
    """Kill those of ``processes`` that have the same parent as this one: they cannot end themselves.

    torchrun sends SIGTERM and then waits for its shutdown timeout; a stopped process does not handle the signal.
    """
    for process in processes:
        if process.pid == os.getpid() or process.host != socket.gethostname():
            continue
        # Only siblings: the pid of a rank that is gone may belong to somebody else's process by now.
        with suppress(OSError, ValueError, IndexError):
            parent = Path("/proc", str(process.pid), "stat").read_text(encoding="ascii", errors="replace")
            if int(parent.rpartition(")")[2].split()[1]) == os.getppid():
                os.kill(process.pid, signal.SIGKILL)


@contextmanager
def watch(
    run: RunDirectory,
    *,
    attempt: int,
    rank: int,
    world_size: int,
    timeout_s: float | None,
    startup_timeout_s: float | None = None,
    num_collectives: Callable[[], int],
) -> Iterator[None]:
    """Write heartbeats inside the ``with`` block, and watch them unless ``timeout_s`` is None.

    Parameters
    ----------
    run : RunDirectory
        An existing run.
    attempt, rank, world_size : int
        Attempt number, rank, number of ranks.
    timeout_s : float or None
        ``watchdog.timeout_s``; None turns the watchdog off.
    startup_timeout_s : float, optional
        The limit of a rank that starts; by default ``timeout_s``.
    num_collectives : Callable[[], int]
        See :class:`~anemoi_dist.telemetry.heartbeat.Heartbeat`.
    """
    if rank == 0:
        clear_beyond(run, world_size=world_size)
    heartbeat = Heartbeat(run, rank=rank, world_size=world_size, attempt=attempt, num_collectives=num_collectives)
    if timeout_s is not None:
        # Other ranks see a file that is up to one interval old; it must stay well below the timeout.
        heartbeat.interval_s = min(heartbeat.interval_s, timeout_s / 4)
    heartbeat.start()
    watchdog = None
    try:
        if timeout_s is not None:
            watchdog = Watchdog(
                heartbeat,
                run=run,
                attempt=attempt,
                rank=rank,
                world_size=world_size,
                timeout_s=timeout_s,
                startup_timeout_s=startup_timeout_s,
            )
            watchdog.start()
        yield
    finally:
        # The watchdog first: closing the heartbeat may take seconds on a slow file system, which is no hang.
        if watchdog is not None:
            watchdog.close()
        heartbeat.close()
