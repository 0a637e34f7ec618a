"""Groups of ranks that share a model or a sample, as anemoi-training's own strategies form them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from anemoi_dist.config.groups import GroupSizes

#: Parts of the names of parameters that are used before the grid is divided: every rank of a group has their whole
#: gradient. Of all others it has the part that its points of the grid contribute.
_UNDIVIDED = ("trainable", "no_gradscaling")


def join_groups(method: Any, groups: GroupSizes) -> None:
    """Create the process groups and tell the training method about them. Collective.

    Parameters
    ----------
    method : anemoi.training.train.methods.base.BaseTrainingModule
        Its model computes this rank's part from here on.
    groups : GroupSizes
        Sizes of the groups.
    """
    # Here: anemoi-training takes seconds to import, and a rank alone needs nothing of this.
    from anemoi.training.distributed.strategy import DDPEnsGroupStrategy, DDPGroupStrategy

    strategy: Any = DDPEnsGroupStrategy if hasattr(method, "set_ens_comm_group") else DDPGroupStrategy
    # Of the strategy only this: the rest of it is DDP.
    strategy._setup_communication_groups(
        SimpleNamespace(
            model=method,
            world_size=dist.get_world_size(),
            global_rank=dist.get_rank(),
            model_comm_group_size=groups.model,
            read_group_size=groups.reader,
            ens_comm_group_size=groups.sample,
            # All ranks take part in each: NCCL splits a group off the whole one, and would wait for those left out.
            use_local_synchronization=False,
        )
    )


def undivided_parameters(module: Any) -> list[str]:
    """Return the names of the trained parameters of which every rank of a group has the whole gradient."""
    trained = (name for name, parameter in module.named_parameters() if parameter.requires_grad)
    return [name for name in trained if any(part in name for part in _UNDIVIDED)]


def divide_reading(dataset: Any, groups: GroupSizes) -> None:
    """Let this rank read only its part of the grid of every sample, which the training method gathers.

    Parameters
    ----------
    dataset : anemoi.training.data.multidataset.MultiDataset
        Changed in place.
    groups : GroupSizes
        Sizes of the groups.
    """
    if groups.reader == 1 or not dist.is_initialized():
        return
    rank = dist.get_rank()
    dataset.set_comm_group_info(
        global_rank=rank,
        model_comm_group_id=rank // groups.model,
        model_comm_group_rank=rank % groups.model,
        model_comm_num_groups=dist.get_world_size() // groups.model,
        reader_group_rank=rank % groups.reader,
        reader_group_size=groups.reader,
        shard_sizes=None,
    )
    dataset.shard_sizes = dataset.shard_shapes  # which follow from what has just been set
