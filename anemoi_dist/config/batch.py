"""Division of the global batch over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from anemoi_dist.config.groups import check_ranks
from anemoi_dist.config.schema import Config
from anemoi_dist.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a batch in samples: ``global_size = world_size / group_size * accumulation * micro_size``.

    Attributes
    ----------
    group_size : int
        Ranks that share their samples.
    """

    global_size: int
    micro_size: int
    accumulation: int
    world_size: int
    group_size: int = 1

    @property
    def num_shares(self) -> int:
        """Parts that the global batch is divided into: one for each group, or for each rank alone."""
        return self.world_size // self.group_size

    def shares_text(self) -> str:
        """Return number and kind of those parts, for a reader."""
        if self.group_size > 1:
            return f"{self.num_shares} {'group' if self.num_shares == 1 else 'groups'} of {self.group_size} ranks"
        return f"{self.num_shares} {'rank' if self.num_shares == 1 else 'ranks'}"

    @property
    def rank_size(self) -> int:
        """Samples that one rank sees in one optimizer step."""
        return self.micro_size * self.accumulation


def plan_batches(config: Config, *, world_size: int) -> BatchPlan:
    """Divide ``training.global_batch_size`` over the ranks, or over the groups of ranks that share a sample.

    Raises
    ------
    ConfigError
        The sizes are not divisible; the message names the nearest that are.
    """
    training, groups = config.training, check_ranks(config.task.settings, world_size)
    total, number = training.global_batch_size, world_size // groups.sample
    unit = "ranks" if groups.sample == 1 else f"groups of {groups.sample} ranks"
    if total % number:
        lower, upper = total // number * number, (total // number + 1) * number
        nearest = " or ".join(str(size) for size in (lower, upper) if size > 0)
        raise ConfigError(
            "training.global_batch_size",
            total,
            f"must be a multiple of the {number} {unit}",
            fix=f"use {nearest}, or a number of {unit} that divides {total}: {_divisors(total)}",
        )
    share = total // number
    # A shared model takes one sample at a time.
    default = share if groups.model == 1 else 1
    micro = default if training.micro_batch_size is None else training.micro_batch_size
    if micro < 1 or share % micro:
        raise ConfigError(
            "training.micro_batch_size",
            micro,
            f"must divide the {share} samples that each of {number} {unit} gets of training.global_batch_size={total}",
            fix=f"use one of {_divisors(share)}",
        )
    if groups.model > 1 and micro > 1:
        rule = f"must be 1 where {groups.model} ranks share a model (num_gpus_per_model)"
        fix = "training.micro_batch_size=1, which accumulates the gradients of the others"
        raise ConfigError("training.micro_batch_size", micro, rule, fix=fix)
    return BatchPlan(total, micro, share // micro, world_size, groups.sample)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
