"""Finds data workers that will never deliver: one that cannot send its batch, is dead, or is stopped."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anemoi_dist.errors import PreflightError

#: Seconds after which a trainer that waits for a batch looks at its workers.
POLL_S = 1.0
#: Seconds that a busy machine may take to end a process that has lost its connections already.
DEATH_S = 60.0
#: Looks in a row at which a worker is stopped: one that a scheduler suspended together with its rank continues at once.
_MAX_STOPPED = 3
#: A write of at most PIPE_BUF bytes is never mixed with another's.
_MAX_REPORT_BYTES = 4000
MORE_SHARED = "more shared memory (df -h /dev/shm; docker run --shm-size)"


class Monitor:
    """Health of the data workers of a rank, which report through a pipe why they cannot send."""

    def __init__(self) -> None:
        self._reports, self._report = os.pipe()
        os.set_blocking(self._reports, False)
        self._workers: Sequence[Any] = ()
        self._is_waiting = False
        self._stopped: int | None = None
        self._ended = threading.Event()

    def __del__(self) -> None:
        for descriptor in (self._reports, self._report):
            os.close(descriptor)

    # In a worker

    def attach(self) -> None:
        """Report, from now on, what this worker cannot send, and end it: a batch that is lost would be waited for."""
        # The queue's own thread pickles a batch after the worker has handed it over. By default it prints the error,
        # drops the batch and goes on.
        multiprocessing.queues.Queue._on_queue_feeder_error = self._fail  # type: ignore[attr-defined]

    def _fail(self, error: BaseException, batch: Any) -> None:
        text = f"{type(error).__name__}: {error}".encode(errors="replace")
        os.write(self._report, text[:_MAX_REPORT_BYTES] + b"\n")
        os._exit(1)

    # In the rank

    def start(self, workers: Sequence[Any]) -> None:
        """Watch these workers from now on."""
        self._workers = workers
        # A daemon, and a thread: fetching the memory of a batch from a worker that is stopped never returns.
        threading.Thread(target=self._watch, name="data-workers", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the rank waits for a batch inside the ``with`` block."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def check(self, error: Exception) -> None:
        """Look at the workers after ``error`` has come instead of a batch.

        Raises
        ------
        PreflightError
            One of them will not deliver.
        """
        # What a worker has caught is the data set's; torch raises its own errors as RuntimeError.
        if not (isinstance(error, RuntimeError) or str(error).startswith("Caught ")):
            # A connection that broke: the kernel closes it before it lets anybody see that the worker is dead.
            multiprocessing.connection.wait([worker.sentinel for worker in self._workers], timeout=DEATH_S)
        if report := self._read():
            raise PreflightError(
                f"a data worker cannot send its batch: {report}\n  fix: a shorter TMPDIR (a socket's path has at most "
                f"107 characters), {MORE_SHARED}, or data.num_workers=0"
            )
        if self._stopped is not None:
            raise PreflightError(
                f"data worker {self._stopped} was stopped (SIGSTOP), and its batches did not come\n"
                "  fix: start again, and stop either a whole job or nothing of it"
            )
        dead = multiprocessing.connection.wait([worker.sentinel for worker in self._workers], timeout=0)
        for worker in self._workers:
            if worker.sentinel in dead or not worker.is_alive():
                worker.join(DEATH_S)  # for its exit code
                raise PreflightError(
                    f"data worker {worker.pid} {_how_it_ended(worker.exitcode)}\n"
                    f"  fix: less memory in workers (data.num_workers, data.prefetch_factor), {MORE_SHARED}, or "
                    "data.num_workers=0, which shows an error of the data set in the rank itself"
                )

    def _watch(self) -> None:
        """End a worker that stays stopped while its rank waits for a batch."""
        num_stopped = 0
        while not self._ended.wait(POLL_S):
            stopped = [worker.pid for worker in self._workers if _is_stopped(worker.pid)] if self._is_waiting else []
            num_stopped = num_stopped + 1 if stopped else 0
            if num_stopped >= _MAX_STOPPED:
                self._stopped = stopped[0]
                os.kill(stopped[0], signal.SIGKILL)
                return

    def _read(self) -> str:
        try:
            text = os.read(self._reports, 2 * _MAX_REPORT_BYTES).decode(errors="replace")
        except BlockingIOError:
            return ""
        return text.partition("\n")[0]


def _how_it_ended(code: int | None) -> str:
    if code is None:  # somebody else has asked the system for it
        return "is dead"
    if code >= 0:
        return f"ended with code {code}"
    reasons = {signal.SIGKILL: " (out of memory? dmesg says)", signal.SIGBUS: " (/dev/shm is full)"}
    return f"was killed by {signal.Signals(-code).name}{reasons.get(signal.Signals(-code), '')}"


def _is_stopped(pid: int) -> bool:
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"
