"""``engine=fsdp2``: torch's ``fully_shard``; every parameter and state is a DTensor split along its first dimension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from anemoi_dist.data.batch import Batch
from anemoi_dist.engines.partitions import sum_of_squares
from anemoi_dist.engines.regions import Region, RegionEngine, local, step_clipped


class Fsdp2Engine(RegionEngine):
    """fp32 parameters sharded by rows; with ``bf16`` they are gathered in bf16 and gradients are reduced in fp32."""

    # Muon needs whole matrices; Rprop writes by index, which DTensor cannot.
    refused_optimizers = (*RegionEngine.refused_optimizers, "Muon", "Rprop")

    def _wrap(self) -> None:
        policy = MixedPrecisionPolicy()
        if self.config.training.precision == "bf16":
            # Inputs are physical values and dates: bf16 would round pressure to 512 Pa. The module casts what the
            # model sees.
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            self.module.compute_dtype = torch.bfloat16
        mesh = init_device_mesh(self.world.device.type, (self.world.world_size,))
        for block in _blocks(self.module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)
        self._create_optimizer()

    def _forward(self, batch: Batch, *, rollout: int) -> torch.Tensor:
        prediction = self.module(batch, rollout=rollout)
        if not torch.is_grad_enabled():
            # The root stays gathered for a backward pass that does not come.
            cast(FSDPModule, self.module).reshard()
        return prediction

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()  # reduced and scattered each time: whole gradients would undo what sharding saves

    def _update(self) -> tuple[float, bool]:
        gradients = [local(p.grad) for p in self.module.parameters() if p.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if gradients:
            square += sum_of_squares(gradients)
        dist.all_reduce(square)
        norm = square.sqrt().float()
        value, skipped = float(norm), not bool(norm.isfinite())
        if not skipped:
            step_clipped(self.optimizer, gradients, norm=norm, limit=self.config.training.clip_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return value, skipped

    def regions(self) -> Iterator[Region]:
        """Yield the rows of every parameter that this rank holds."""
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            rows = parameter.shape[0]
            # torch.chunk's rule, which FSDP2 follows: equal chunks, the last ones short or empty.
            chunk_rows = -(-rows // self.world.world_size)
            first_row = min(self.world.rank * chunk_rows, rows)
            row_numel = parameter.numel() // rows
            held = local(parameter).numel()
            yield Region(name, tuple(parameter.shape), first_row * row_numel, held, parameter, 0)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a model, each gathered by itself; never one that shares a parameter with others."""
    uses = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    for container in module.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for block in container:
                parameters = list(block.parameters())
                if parameters and all(uses[id(p)] == 1 for p in parameters) and not _nested(block):
                    yield block


def _nested(block: nn.Module) -> bool:
    """Whether the block itself holds lists of blocks: then those are gathered, not it."""
    return any(isinstance(m, nn.ModuleList | nn.Sequential) for m in block.modules())
