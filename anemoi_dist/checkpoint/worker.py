"""A background thread that runs jobs one at a time and reports if it dies."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from anemoi_dist.telemetry.heartbeat import follow


class Job:
    """Work given to a :class:`Worker`; it ends with a result or an error, also where the thread dies."""

    def __init__(self, function: Callable[[], str], thread: threading.Thread | None) -> None:
        self._function, self._thread = function, thread
        self._done = threading.Event()
        self.result: str = ""
        self.error: BaseException | None = None

    @classmethod
    def failed(cls, error: BaseException) -> Job:
        """Return a job that failed before it began."""
        job = cls(str, None)
        job.error = error
        job._done.set()
        return job

    def run(self) -> None:
        """Do it; whatever is raised is kept for the trainer to see."""
        # BaseException: a SystemExit or KeyboardInterrupt in this thread would end it silently, and the rank would wait
        # for a job that nobody does.
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        if not self._done.is_set() and self._thread is not None and not self._thread.is_alive():
            self.error = RuntimeError("the thread that writes checkpoints is dead")
            self._done.set()
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until it has ended."""
        # In slices: each asks whether the thread is alive, and passes its sign of life on to the watchdog, which would
        # otherwise take a slow disk for a hang of this rank.
        while not self.is_done:
            self._done.wait(1.0)
            follow()


class Worker:
    """The thread; it starts with the first job. A process may end while it works: nothing it leaves looks whole."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], str]) -> Job:
        """Have ``function`` called after what was submitted before."""
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a process that must end (a lost peer, a kill) does not wait for a disk that hangs.
            self._thread = threading.Thread(target=self._serve, name="checkpoint-writer", daemon=True)
            self._thread.start()
        job = Job(function, self._thread)
        self._jobs.put(job)
        return job

    def _serve(self) -> None:
        while True:
            self._jobs.get().run()
