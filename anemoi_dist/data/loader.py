"""Batches read ahead by worker processes that a signal meant for the trainer does not hit and that never outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from anemoi_dist.config import BatchPlan, DataConfig
from anemoi_dist.data.batch import Batch
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler
from anemoi_dist.parent import die_with_parent

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class BatchLoader(Iterator[list[Batch]]):
    """Yields the micro-batches of one optimizer step after another, without end.

    Attributes
    ----------
    workers : tuple[multiprocessing.Process, ...]
        The processes that read ahead; empty for ``num_workers=0``.
    """

    def __init__(self, loader: DataLoader, *, accumulation: int) -> None:
        before = set(multiprocessing.active_children())
        self._batches: Iterator[Batch] = iter(loader)
        self.workers = tuple(set(multiprocessing.active_children()) - before)
        self._accumulation = accumulation
        # Also at exit, before multiprocessing joins its children: a worker that ignores SIGTERM would never return.
        self._close = weakref.finalize(self, _end, self._batches, self.workers)

    def __next__(self) -> list[Batch]:
        if not self._close.alive:
            raise StopIteration
        return [next(self._batches) for _ in range(self._accumulation)]

    def close(self) -> None:
        """End the workers. Harmless when repeated."""
        self._close()


def build_loader(
    dataset: Dataset,
    *,
    order: GlobalSampleOrder,
    plan: BatchPlan,
    rank: int,
    start_step: int = 0,
    data_config: DataConfig,
    pin_memory: bool = False,
) -> BatchLoader:
    """Start reading this rank's micro-batches.

    Call it from the main thread: workers end when the thread that started them ends.

    Parameters
    ----------
    dataset : Dataset
        Gives samples by index (``WeatherDataset``).
    order, plan, rank, start_step
        Which samples, see :class:`MicroBatchSampler`.
    data_config : DataConfig
        ``num_workers`` (0 reads in this process) and ``prefetch_factor``.
    pin_memory : bool
        Hand out page-locked memory, for asynchronous copies to a GPU.
    """
    workers: dict[str, Any] = {}
    if data_config.num_workers:
        workers = {
            "prefetch_factor": data_config.prefetch_factor,
            # Named, since Python 3.14 changes the default. Forking costs milliseconds where a fresh interpreter costs
            # seconds per worker, and it is safe here: a worker uses neither CUDA nor a process group, torch gives it
            # one thread (so no OpenMP pool that fork has lost), and zarr 2 keeps no threads. Blosc's pool restarts
            # itself after a fork.
            "multiprocessing_context": "fork",
            "worker_init_fn": partial(_start_worker, parent_pid=os.getpid()),
        }
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=MicroBatchSampler(order, plan=plan, rank=rank, start_step=start_step),
        num_workers=data_config.num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        **workers,
    )
    return BatchLoader(loader, accumulation=plan.accumulation)


def collate(samples: list[Batch]) -> Batch:
    """Stack samples along a new first axis."""
    return Batch(torch.stack([s.fields for s in samples]), torch.stack([s.dates for s in samples]))


def _start_worker(worker: int, *, parent_pid: int) -> None:
    """Make a worker deaf to what schedulers send to the whole job, and mortal with its parent.

    A survivor would hold the killed rank's sockets, and the other ranks would wait for it instead of failing.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid=parent_pid)


def _end(batches: Any, workers: tuple[Any, ...]) -> None:
    # By name, since dropping the iterator does nothing while a traceback holds it, and then at the wrong moment.
    if workers:
        batches._shutdown_workers()
    for worker in workers:
        if worker.is_alive():  # stuck in a read
            worker.kill()
