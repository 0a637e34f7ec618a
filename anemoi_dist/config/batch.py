"""Division of the global batch over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from anemoi_dist.config.schema import TrainingConfig
from anemoi_dist.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a batch in samples: ``global_size = world_size * accumulation * micro_size``."""

    global_size: int
    micro_size: int
    accumulation: int
    world_size: int

    @property
    def rank_size(self) -> int:
        """Samples that one rank sees in one optimizer step."""
        return self.micro_size * self.accumulation


def plan_batches(training: TrainingConfig, *, world_size: int) -> BatchPlan:
    """Divide ``training.global_batch_size`` over the ranks.

    Raises
    ------
    ConfigError
        The sizes are not divisible; the message names the nearest that are.
    """
    total = training.global_batch_size
    if total % world_size:
        lower, upper = total // world_size * world_size, (total // world_size + 1) * world_size
        nearest = " or ".join(str(size) for size in (lower, upper) if size > 0)
        raise ConfigError(
            "training.global_batch_size",
            total,
            f"must be a multiple of the {world_size} ranks",
            fix=f"use {nearest}, or a number of ranks that divides {total}: {_divisors(total)}",
        )
    share = total // world_size
    micro = share if training.micro_batch_size is None else training.micro_batch_size
    if micro < 1 or share % micro:
        raise ConfigError(
            "training.micro_batch_size",
            micro,
            f"must divide the {share} samples that each of {world_size} ranks gets of "
            f"training.global_batch_size={total}",
            fix=f"use one of {_divisors(share)}",
        )
    return BatchPlan(total, micro, share // micro, world_size)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
