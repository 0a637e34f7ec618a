"""Which sample comes when: a function of (seed, global sample index), whatever the number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from anemoi_dist.config.batch import BatchPlan


class GlobalSampleOrder:
    """An endless sequence of samples: one permutation of the dataset after another, one for each epoch.

    Parameters
    ----------
    num_samples : int
        Samples in the dataset.
    seed : int
        Names the sequence.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: must be at least 1")
        self.num_samples, self.seed = num_samples, seed
        # A step may straddle two epochs.
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def __getitem__(self, global_index: int) -> int:
        """Return the sample at ``global_index`` (from 0 on, without end)."""
        if global_index < 0:
            raise IndexError(f"global_index={global_index}: must not be negative")
        epoch, position = divmod(global_index, self.num_samples)
        return int(self._permutation(epoch)[position])

    def _make_permutation(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        # Raw bits of a counter-based generator, sorted: numpy promises them for all versions, which it does not for
        # `Generator.permutation`. A run may be resumed under another version.
        return np.argsort(np.random.Philox(key=key).random_raw(self.num_samples), kind="stable")


class MicroBatchSampler:
    """The micro-batches of one rank, step after step, without end.

    Optimizer step ``s`` (from 0) takes global samples ``[s G, (s + 1) G)``; rank ``r`` has the ``r``-th share of
    them, cut into micro-batches in order.

    Parameters
    ----------
    order : GlobalSampleOrder
        Which sample comes when.
    plan : BatchPlan
        How a global batch is cut.
    rank : int
        Whose share.
    start_step : int
        Optimizer steps already done.
    """

    def __init__(self, order: GlobalSampleOrder, *, plan: BatchPlan, rank: int, start_step: int = 0) -> None:
        if not 0 <= rank < plan.world_size:
            raise ValueError(f"rank={rank}: must be from 0 to {plan.world_size - 1}")
        self.order, self.plan, self.rank, self.start_step = order, plan, rank, start_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start_step):
            for micro in range(self.plan.accumulation):
                yield self.samples(step, micro)

    def samples(self, step: int, micro: int) -> list[int]:
        """Return the samples of micro-batch ``micro`` in optimizer step ``step``."""
        size = self.plan.micro_size
        first = step * self.plan.global_size + self.rank * self.plan.rank_size + micro * size
        return [self.order[index] for index in range(first, first + size)]
