"""Hangs: a run in which no rank goes on any more shows its stacks, says who is to blame, and ends with code 6.

In every rank a thread looks at the signs of life of its training thread (``heartbeat.py``). Where they fail for
``watchdog.timeout_s`` it writes the stacks of all threads into the rank's log and marks its heartbeat as stalled. The
run has hung when every rank is stalled, or does not even answer: a rank that waits for another one which still works
is no hang. Rank 0 decides that, or the first rank after it whose watchdog lives; it alone reads all heartbeats.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from anemoi_dist.errors import AnemoiDistError, ExitCode
from anemoi_dist.process.deadman import Deadman
from anemoi_dist.run.attempt import record_end
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog
from anemoi_dist.run.records import Failure, Hang, Process, to_json
from anemoi_dist.telemetry.heartbeat import Heartbeat, clear_beyond, read_heartbeat, read_heartbeats

#: How much longer than the watchdog a rank waits for another in C code: who ends the run must still find it whole.
_GRACE_S = 20.0
_NUM_NAMED = 8


def find_hang(
    beats: Mapping[int, Mapping[str, Any]], *, world_size: int, now: float, timeout_s: float, margin_s: float = 0.0
) -> Hang | None:
    """Return who is to blame where no rank goes on; None while one does. Pure.

    Parameters
    ----------
    beats : Mapping[int, Mapping[str, Any]]
        The heartbeats of this attempt by rank.
    world_size : int
        Ranks there should be. One without a heartbeat has never got as far as giving one.
    now : float
        Unix seconds.
    timeout_s : float
        ``watchdog.timeout_s``.
    margin_s : float, optional
        How much longer a rank may be silent before it counts though it has not said itself that it is stalled: clocks
        differ, and its watchdog looks only now and then.
    """
    never = {"time": 0.0, "collectives": -1}
    ranks = {rank: beats.get(rank, never) for rank in range(world_size)}
    if any(not beat.get("stalled") and now - beat["time"] < timeout_s + margin_s for beat in ranks.values()):
        return None
    # Ranks begin the same collectives in the same order: whoever has begun the fewest keeps the others waiting.
    counts = {rank: beat.get("collectives", 0) for rank, beat in ranks.items()}
    fewest = min(counts.values())
    behind = [rank for rank, count in counts.items() if count == fewest]
    blamed = min(behind, key=lambda rank: ranks[rank]["time"])
    silent = [rank for rank, beat in ranks.items() if not beat.get("stalled")]
    beat = ranks[blamed]
    if blamed not in beats:
        return Hang(blamed, silent_s=timeout_s, behind=behind[:_NUM_NAMED])
    return Hang(
        blamed,
        host=beat["host"],
        pid=beat["pid"],
        phase=beat["phase"],
        step=beat["step"],
        silent_s=round(now - beat["time"], 1),
        where=beat.get("where", ""),
        behind=behind[:_NUM_NAMED] if len(behind) < world_size else [],
        unresponsive=[_process(beats[rank]) for rank in silent if rank in beats][:_NUM_NAMED],
    )


def _process(beat: Mapping[str, Any]) -> Process:
    return Process(beat["rank"], host=beat["host"], pid=beat["pid"])


def record_hang(run: RunDirectory, attempt: int, hang: Hang) -> None:
    """Record the end of an attempt that has hung, and the event."""
    log_file = str(run.log_file(attempt, hang.rank))
    failure = Failure(hang.rank, host=hang.host, pid=hang.pid, error=str(hang), log=log_file, hang=hang)
    if record_end(run, attempt, ExitCode.HANG, failure=failure) != ExitCode.HANG:
        return
    log = EventLog(run.events_file)
    log.write("hang", attempt=attempt, **to_json(hang))
    log.close()


def record_unsaid_hang(run: RunDirectory) -> None:
    """Record the hang of the last attempt where none of its ranks could: one alone, ended by its dead man's switch.

    For who has started the ranks and seen one end with code 6.
    """
    attempts = run.read_state().attempts
    if not attempts or attempts[-1].exit_code is not None:
        return
    number = attempts[-1].number
    beats = read_heartbeats(run, attempt=number)
    # They have ended: none goes on, whatever the clocks say.
    world_size = attempts[-1].world_size or 1
    hang = find_hang(beats, world_size=world_size, now=time.time(), timeout_s=0.0, margin_s=-math.inf)
    if hang is not None:
        record_hang(run, number, hang)


class Watchdog:
    """Watches the training thread of one rank: the one that starts it.

    Parameters
    ----------
    heartbeat : Heartbeat
        Of this rank.
    run : RunDirectory
        Where the end is recorded.
    attempt, rank, world_size : int
        Who this is.
    timeout_s : float
        ``watchdog.timeout_s``.
    """

    def __init__(
        self, heartbeat: Heartbeat, *, run: RunDirectory, attempt: int, rank: int, world_size: int, timeout_s: float
    ) -> None:
        self._heartbeat, self._run, self._attempt = heartbeat, run, attempt
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._tick_s = min(1.0, timeout_s / 10)
        self._watched = threading.get_ident()
        self._log: IO[str] = run.log_file(attempt, rank).open("a", buffering=1, encoding="utf-8")
        # A lone rank has nobody to end the run in its stead. The others' watchdogs need time to do it in order.
        grace_s = 3.0 if world_size == 1 else _GRACE_S
        self._deadman = Deadman(grace_s=grace_s, code=ExitCode.HANG, log=self._log)
        self._is_stalled, self._no_judge_since, self._seen = False, 0.0, 0.0
        self._closed = threading.Event()
        self._deciding = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._hold()
        self._thread.start()

    def close(self) -> None:
        """Watch no more. Where this rank's watchdog is about to end the run, it does."""
        with self._deciding:
            self._closed.set()
        self._thread.join(timeout=10 * self._tick_s)
        self._deadman.close()
        self._log.close()

    def _watch(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._hold()
            with suppress(OSError, AnemoiDistError):  # a file that cannot be read or written is tried again
                self._look()

    def _hold(self) -> None:
        """Keep the dead man's switch from going off until shortly after this thread would have acted."""
        left_s = self._timeout_s - self._heartbeat.silent_s()
        self._deadman.hold((left_s if left_s > 0 else self._timeout_s) + 2 * self._tick_s)

    def _look(self) -> None:
        if self._heartbeat.silent_s() < self._timeout_s:
            self._recover()
            return
        with self._deciding:
            if not self._closed.is_set():
                self._stall()

    def _recover(self) -> None:
        if self._is_stalled:
            self._is_stalled, self._no_judge_since = False, 0.0
            self._heartbeat.write()
            self._say("it goes on: the run had not hung (watchdog.timeout_s is short for it)")

    def _stall(self) -> None:
        """Show where this rank stands, and end it where the run has hung."""
        if not self._is_stalled:
            self._is_stalled = True
            beat = self._heartbeat
            self._say(
                f"no sign of life for watchdog.timeout_s={self._timeout_s:g} s, in phase {beat.phase} after step "
                f"{beat.step}; the stacks of all threads:"
            )
            faulthandler.dump_traceback(self._log)
        if time.monotonic() - self._seen >= min(self._heartbeat.interval_s, self._timeout_s / 4):
            self._seen = time.monotonic()
            self._heartbeat.write(stalled=True, seen=time.time(), where=self._where())
        hang = self._recorded() or (self._judge() if self._is_judge() else None)
        if hang is None:
            return
        # The training thread may have gone on while we looked; what is recorded already stands.
        self._say(str(hang))
        kill_siblings(hang.unresponsive)
        os._exit(ExitCode.HANG)

    def _judge(self) -> Hang | None:
        """Look at all ranks; record a hang where there is one."""
        beats = read_heartbeats(self._run, attempt=self._attempt)
        hang = find_hang(
            beats,
            world_size=self._world_size,
            now=time.time(),
            timeout_s=self._timeout_s,
            margin_s=3 * self._tick_s + 1.0,
        )
        if hang is None or self._heartbeat.silent_s() < self._timeout_s:
            return None
        with suppress(OSError):  # a full disk: the exit code still says it
            record_hang(self._run, self._attempt, hang)
        log_file = self._run.log_file(self._attempt, hang.rank)
        print(f"{hang}; its stacks: {log_file}", file=sys.stderr, flush=True)  # noqa: T201
        return hang

    def _is_judge(self) -> bool:
        """Whether this rank decides: rank 0, or the next one if its watchdog gives no sign of life either."""
        if self._rank == 0:
            return True
        judge = read_heartbeat(self._run.heartbeat_file(0))
        now = time.time()
        if judge is not None and judge["attempt"] == self._attempt:
            recent_s = max(3.0, 2 * self._heartbeat.interval_s) if judge.get("stalled") else self._timeout_s
            if now - judge.get("seen", judge["time"]) < recent_s:
                self._no_judge_since = 0.0
                return False
        self._no_judge_since = self._no_judge_since or now
        # One after the other, so that the second finds what the first has recorded.
        return now - self._no_judge_since >= 0.5 * min(self._rank - 1, 30)

    def _recorded(self) -> Hang | None:
        """Return the hang that another rank has recorded."""
        failure = self._run.read_state().attempts[self._attempt - 1].failure
        return None if failure is None else failure.hang

    def _where(self) -> str:
        frame = sys._current_frames().get(self._watched)
        return place_of(frame)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._log.write(f"{stamp} watchdog: rank {self._rank}: {text}\n")


def place_of(frame: FrameType | None, *, depth: int = 4) -> str:
    """Return the innermost calls of a stack, the innermost first: ``model.py:12 in forward < module.py:40 in loss``."""
    calls: list[str] = []
    while frame is not None and len(calls) < depth:
        code = frame.f_code
        calls.append(f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return " < ".join(calls)


def kill_siblings(processes: list[Process]) -> None:
    """Kill those of ``processes`` that were started by who started this one: they cannot end themselves.

    torchrun asks a rank to end and waits for minutes; one that is stopped does not hear it.
    """
    for process in processes:
        if process.pid == os.getpid() or process.host != socket.gethostname():
            continue
        with suppress(OSError, ValueError, IndexError):
            parent = Path("/proc", str(process.pid), "stat").read_text(encoding="ascii", errors="replace")
            if int(parent.rpartition(")")[2].split()[1]) == os.getppid():
                os.kill(process.pid, signal.SIGKILL)


@contextmanager
def watch(
    run: RunDirectory, *, attempt: int, rank: int, world_size: int, timeout_s: float | None, num_collectives: Any
) -> Iterator[None]:
    """Give signs of life, and watch them unless ``timeout_s`` is None, inside the ``with`` block.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    attempt, rank, world_size : int
        Who this is.
    timeout_s : float or None
        ``watchdog.timeout_s``.
    num_collectives : Callable[[], int]
        See :class:`~anemoi_dist.telemetry.heartbeat.Heartbeat`.
    """
    if rank == 0:
        clear_beyond(run, world_size=world_size)
    heartbeat = Heartbeat(run, rank=rank, world_size=world_size, attempt=attempt, num_collectives=num_collectives)
    if timeout_s is not None:
        heartbeat.interval_s = min(heartbeat.interval_s, timeout_s / 4)
    heartbeat.start()
    watchdog = None
    try:
        if timeout_s is not None:
            watchdog = Watchdog(
                heartbeat, run=run, attempt=attempt, rank=rank, world_size=world_size, timeout_s=timeout_s
            )
            watchdog.start()
        yield
    finally:
        if watchdog is not None:
            watchdog.close()
        heartbeat.close()
