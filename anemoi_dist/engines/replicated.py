"""``engine=ddp``: parameters and states whole on every rank, for comparison with the sharded engines."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from anemoi_dist.engines.sharded import LocalShard, ShardedEngine
from anemoi_dist.optimizers.norm import squared_norms
from anemoi_dist.tasks.base import Batch

_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
#: Buffers are made the same where they are read, in evaluations and saves. torch 2.13 has renamed the argument.
_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}


class DdpEngine(ShardedEngine):
    """torch's DistributedDataParallel around fp32 parameters; ``precision: bf16`` computes under autocast."""

    def _wrap(self) -> None:
        if self.config.training.precision == "bf16":
            self.module.autocast_dtype = torch.bfloat16
        # A branch that some step does not use is an error otherwise. Where all are used it says so, once.
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        self._ddp = DistributedDataParallel(
            self.module,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            find_unused_parameters=True,
            **_BUFFERS,
        )
        self._create_optimizer()

    def _forward(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        return self._ddp(batch, **evaluation)

    def _micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        # One all-reduce a step: gradients of earlier micro-batches add up locally first. DDP asks in the forward pass.
        return nullcontext() if is_last else self._ddp.no_sync()

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()

    def _update(self) -> tuple[float, bool]:
        return step_replicated(self)

    def local_shards(self) -> Iterator[LocalShard]:
        """Yield every parameter whole."""
        yield from replicated_shards(self.module)


def replicated_shards(module: torch.nn.Module, *, frozen_only: bool = False) -> Iterator[LocalShard]:
    """Yield the parameters of a module that every rank holds whole: all, or those without gradient."""
    for name, parameter in module.named_parameters():
        if not (frozen_only and parameter.requires_grad):
            yield LocalShard(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, replicated=True)


def step_replicated(engine: ShardedEngine) -> tuple[float, bool]:
    """Clip and step gradients that are already the same on every rank; skip where they are not finite.

    Returns
    -------
    tuple[float, bool]
        L2 norm of the gradient, and whether the update was skipped.
    """
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    engine.sum_over_ranks()
    # No collective: equal gradients give every rank the same norm, bit for bit, and so the same decision to skip.
    norm = squared_norms(gradients).sum().sqrt().float()
    skipped = not bool(norm.isfinite())
    if not skipped:
        with engine.clipped(gradients, norm=norm):
            engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    return float(norm), skipped
