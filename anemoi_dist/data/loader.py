"""Batches read ahead by worker processes, which ignore signals meant for the trainer and never outlive it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import selectors
import signal
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from anemoi_dist.config.schema import DataConfig
from anemoi_dist.data.monitor import MORE_SHARED, POLL_S, Monitor
from anemoi_dist.data.sampler import MicroBatchSampler
from anemoi_dist.errors import PreflightError
from anemoi_dist.process.parent_death import die_with_parent
from anemoi_dist.telemetry.heartbeat import beat

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
#: Seconds that each attempt at starting the workers may take. They need milliseconds, unless the machine is overloaded.
_PATIENCE_S = (5.0, 15.0, 45.0)
_PID = struct.Struct("=i")


class BatchLoader(Iterator[list[Any]]):
    """Yields the micro-batches of one optimizer step after another, without end.

    Attributes
    ----------
    workers : tuple[multiprocessing.Process, ...]
        The processes that read ahead; empty for ``num_workers=0``.
    """

    def __init__(
        self, batches: Iterator[Any], workers: tuple[Any, ...], *, accumulation: int, monitor: Monitor | None = None
    ) -> None:
        self._batches, self.workers, self._accumulation, self._monitor = batches, workers, accumulation, monitor
        # Runs at exit too, before multiprocessing joins its children: joining a worker that ignores SIGTERM never ends.
        self._close = weakref.finalize(self, _end, self._batches, self.workers)

    def __next__(self) -> list[Any]:
        # Closed: torch's iterator would start to wait for workers that are gone.
        if not self._close.alive:
            raise StopIteration
        return [self._next() for _ in range(self._accumulation)]

    def _next(self) -> Any:
        if self._monitor is None:
            return next(self._batches)
        while True:
            try:
                with self._monitor.waiting():
                    return next(self._batches)
            # Of a worker that is gone: no file of its socket, no connection, no end of its message.
            except (RuntimeError, OSError, EOFError) as error:
                self._monitor.check(error)
                # Raised by torch after its timeout, and then asking again goes on waiting.
                if not str(error).startswith("DataLoader timed out"):
                    raise

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        if self._monitor is not None:
            self._monitor.stop()
        self._close()


class _Reads:
    """Reads of samples, each for its optimizer step, as the dataset that torch's loader indexes."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __getitem__(self, key: tuple[int, int]) -> Any:
        step, index = key
        return self._samples.read(index, step=step)


def build_loader(
    samples: Any,
    *,
    sampler: MicroBatchSampler,
    collate: Callable[[Sequence[Any]], Any],
    data_config: DataConfig,
    pin_memory: bool = False,
) -> BatchLoader:
    """Start reading this rank's micro-batches.

    Call it from the main thread: the parent-death signal is bound to the thread that starts the workers.

    Parameters
    ----------
    samples : Samples
        The training split.
    sampler : MicroBatchSampler
        Indices of the samples of each micro-batch.
    collate : Callable[[Sequence[Any]], Any]
        Joins samples into one batch.
    data_config : DataConfig
        ``num_workers`` (0 reads in this process) and ``prefetch_factor``.
    pin_memory : bool
        Return page-locked memory, for asynchronous copies to a GPU.

    Raises
    ------
    PreflightError
        The workers cannot be started.
    RuntimeError
        They have not started in time.
    """
    options: dict[str, Any] = {
        "dataset": _Reads(samples),
        "batch_sampler": sampler,
        "collate_fn": collate,
        "pin_memory": pin_memory,
    }
    if not data_config.num_workers:
        return BatchLoader(iter(DataLoader(**options)), (), accumulation=sampler.plan.accumulation)
    monitor = Monitor()
    ready, say_ready = os.pipe()
    try:
        loader: DataLoader = DataLoader(
            **options,
            num_workers=data_config.num_workers,
            prefetch_factor=data_config.prefetch_factor,
            # Python 3.14 changes the default. A fork takes milliseconds, a fresh interpreter seconds. It is safe once
            # Python runs in the child: a worker uses neither CUDA nor a process group, torch gives it one thread (no
            # OpenMP pool whose threads the fork has lost), zarr 2 has no threads, and Blosc's pool restarts itself.
            multiprocessing_context="fork",
            worker_init_fn=partial(_start_worker, parent_pid=os.getpid(), say_ready=say_ready, monitor=monitor),
            timeout=POLL_S,
        )
        batches, workers = _start_workers(loader, ready)
        monitor.start(workers)
    finally:
        os.close(ready)
        os.close(say_ready)
    return BatchLoader(batches, workers, accumulation=sampler.plan.accumulation, monitor=monitor)


@contextlib.contextmanager
def _own_children() -> Iterator[None]:
    """Undo that torch raises an error out of whatever runs when a child ends: :class:`Monitor` looks for them."""
    former = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, former)


def _start_workers(loader: DataLoader, ready: int) -> tuple[Iterator[Any], tuple[Any, ...]]:
    """Fork the workers, and fork them again if one of them does not start.

    Before CPython 3.12 (github.com/python/cpython/issues/112275) a child hangs before it runs any Python if another
    thread of the parent held a lock of the interpreter during the fork; gloo's threads hold it for microseconds now and
    then.
    """
    for patience_s in _PATIENCE_S:
        before = set(multiprocessing.active_children())
        try:
            with _own_children():
                batches = iter(loader)
        except OSError as error:
            raise PreflightError(
                f"the data workers cannot be started: {error}\n  fix: {MORE_SHARED}, a larger limit of processes "
                "(ulimit -u), or data.num_workers=0"
            ) from error
        # By difference: the rank may have other children, and the iterator's own list is private to torch.
        workers = tuple(set(multiprocessing.active_children()) - before)
        if _all_ready({worker.pid for worker in workers}, ready, patience_s=patience_s):
            return batches, workers
        _end(batches, workers)
    raise RuntimeError(
        f"some of {loader.num_workers} data workers have not started within {_PATIENCE_S[-1]:g} s, in any of "
        f"{len(_PATIENCE_S)} attempts: this machine is overloaded, or data.num_workers is too high for it"
    )


def _all_ready(pids: set[int | None], ready: int, *, patience_s: float) -> bool:
    """Return whether all of ``pids`` have been written to the pipe in time."""
    deadline = time.monotonic() + patience_s
    silent = set(pids)
    with selectors.DefaultSelector() as selector:
        selector.register(ready, selectors.EVENT_READ)
        while silent and (left_s := deadline - time.monotonic()) > 0:
            if selector.select(min(left_s, 1.0)):
                # Several workers at once: writes of 4 bytes to a pipe are atomic, so records are never interleaved.
                silent -= {pid for (pid,) in _PID.iter_unpack(os.read(ready, 1024 * _PID.size))}
            beat()  # a machine that is slow to start workers is no hang
    return not silent


def _start_worker(worker: int, *, parent_pid: int, say_ready: int, monitor: Monitor) -> None:
    """Ignore signals that schedulers send to the whole job, end with the parent, and report that the worker runs.

    A survivor would hold the sockets of a killed rank, and the other ranks would wait for it instead of failing.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid=parent_pid)
    monitor.attach()
    os.write(say_ready, _PID.pack(os.getpid()))


def _end(batches: Any, workers: tuple[Any, ...]) -> None:
    # Explicitly: deleting the iterator does nothing while a traceback refers to it, and then acts at the wrong moment.
    if workers:
        batches._shutdown_workers()
    for worker in workers:
        if worker.is_alive():  # stuck in a read
            worker.kill()
