"""``engine=ddp``: parameters and states whole on every rank, for comparison with the sharded engines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from anemoi_dist.engines.sharded import LocalShard, ShardedEngine, clipped
from anemoi_dist.optimizers.norm import squared_norms
from anemoi_dist.tasks.base import Batch


class DdpEngine(ShardedEngine):
    """torch's DistributedDataParallel around fp32 parameters; ``bf16`` computes under autocast."""

    def _wrap(self) -> None:
        if self.config.training.precision == "bf16":
            self.module.autocast_dtype = torch.bfloat16
        # A branch that some step does not use is an error otherwise. Where all are used it says so, once.
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        self._ddp = DistributedDataParallel(
            self.module,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            find_unused_parameters=True,
        )
        self._create_optimizer()

    def _forward(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        return self._ddp(batch, **evaluation)

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        with nullcontext() if is_last else self._ddp.no_sync():
            loss.backward()

    def _update(self) -> tuple[float, bool]:
        return step_replicated(self.optimizer, self.module, limit=self.config.training.clip_grad_norm)

    def local_shards(self) -> Iterator[LocalShard]:
        """Yield every parameter whole."""
        yield from replicated_shards(self.module)


def replicated_shards(module: torch.nn.Module) -> Iterator[LocalShard]:
    """Yield the parameters of a module that every rank holds whole."""
    for name, parameter in module.named_parameters():
        yield LocalShard(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, replicated=True)


def step_replicated(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module, *, limit: float | None
) -> tuple[float, bool]:
    """Clip and step gradients that are already the same on every rank; skip where they are not finite."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = squared_norms(gradients).sum().sqrt().float()
    value = float(norm)
    skipped = not norm.isfinite()
    if not skipped:
        with clipped(optimizer, gradients, norm=norm, limit=limit):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, bool(skipped)
