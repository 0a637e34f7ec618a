"""Global sample order: a function of (seed, global sample index), independent of the number of ranks."""

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
        Seed of the permutations.

    Raises
    ------
    ValueError
        The dataset is empty.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: must be at least 1")
        self.num_samples, self.seed = num_samples, seed
        # Two, because a step may cover the end of one epoch and the beginning of the next.
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def __getitem__(self, global_index: int) -> int:
        """Return the sample at ``global_index``, counted from 0 through all epochs."""
        if global_index < 0:
            raise IndexError(f"global_index={global_index}: must not be negative")
        # Batches ignore the ends of epochs: none is short, and no sample is dropped.
        epoch, position = divmod(global_index, self.num_samples)
        return int(self._permutation(epoch)[position])

    def _make_permutation(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        # Sorted raw bits of a counter-based generator: numpy guarantees them across versions, but not the result of
        # `Generator.permutation`, and a run may be resumed under another version.
        return np.argsort(np.random.Philox(key=key).random_raw(self.num_samples), kind="stable")


class MicroBatchSampler:
    """The micro-batches of one rank, step after step, without end.

    Each optimizer step takes the next ``G`` global samples; rank ``r`` has the ``r``-th share of them, cut into
    micro-batches in order. Where ranks share their samples, each group has one share.

    Parameters
    ----------
    order : GlobalSampleOrder
        The global sample order.
    plan : BatchPlan
        Division of the global batch into micro-batches.
    rank : int
        This rank.
    start_step : int
        Optimizer steps already done.
    start_sample : int | None
        Global samples that they took; None: ``G`` each.

    Raises
    ------
    ValueError
        ``rank`` is not a rank of the plan.
    """

    def __init__(
        self,
        order: GlobalSampleOrder,
        *,
        plan: BatchPlan,
        rank: int,
        start_step: int = 0,
        start_sample: int | None = None,
    ) -> None:
        if not 0 <= rank < plan.world_size:
            raise ValueError(f"rank={rank}: must be from 0 to {plan.world_size - 1}")
        self.order, self.plan, self.rank, self.start_step = order, plan, rank, start_step
        position = start_step * plan.global_size if start_sample is None else start_sample
        self._first_sample = position - start_step * plan.global_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield (optimizer step, sample) of every sample of a micro-batch."""
        for step in itertools.count(self.start_step):
            for micro in range(self.plan.accumulation):
                yield [(step, sample) for sample in self.samples(step, micro)]

    def samples(self, step: int, micro: int) -> list[int]:
        """Return the samples of micro-batch ``micro`` in optimizer step ``step``."""
        # Consecutive shares, so that a step has the same samples on any number of ranks and any micro-batch size.
        size, share = self.plan.micro_size, self.rank // self.plan.group_size
        first = self._first_sample + step * self.plan.global_size + share * self.plan.rank_size + micro * size
        return [self.order[index] for index in range(first, first + size)]
