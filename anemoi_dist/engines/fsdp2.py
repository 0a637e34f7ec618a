"""``engine=fsdp2``: torch's ``fully_shard``; every parameter and state is a DTensor split along its first dimension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from anemoi_dist.engines.sharded import LocalShard, ShardedEngine, local, step_only
from anemoi_dist.optimizers.norm import squared_norms, sum_of_squares
from anemoi_dist.tasks.base import Batch


class Fsdp2Engine(ShardedEngine):
    """fp32 parameters sharded by rows; with ``bf16`` they are gathered in bf16 and gradients are reduced in fp32."""

    # Muon needs whole matrices; Rprop writes by index, which DTensor cannot.
    refused_optimizers = (*ShardedEngine.refused_optimizers, "Muon", "Rprop")

    def _install_gradient_factors(self) -> None:
        """Do nothing yet: hooks of parameters are not run, and gradients are multiplied once they are reduced."""

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
        blocks = list(dict.fromkeys(_blocks(self.module)))  # a list may hold one twice
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)
        self._create_optimizer()
        self._factors = {self.module.get_parameter(name): f for name, f in self.module.gradient_factors.items()}
        self._squares: dict[nn.Parameter, torch.Tensor] = {}
        self._is_last = False
        self._under_way: dict[FSDPModule, Any] = {}
        # What is stepped first, and gathered for the next forward pass while the rest is stepped.
        self._ahead: list[tuple[FSDPModule, list[nn.Parameter]]] = []
        self._rest = list(self.module.parameters())
        if self.config.engine.overlap:
            in_blocks = {parameter for block in blocks for parameter in block.parameters()}
            outside = [parameter for parameter in self._rest if parameter not in in_blocks]
            self._ahead = [(cast(FSDPModule, self.module), outside)]
            self._ahead += [(cast(FSDPModule, block), list(block.parameters())) for block in blocks[:1]]
            ahead = {parameter for _, parameters in self._ahead for parameter in parameters}
            self._rest = [parameter for parameter in self._rest if parameter not in ahead]
            for parameter in self.module.parameters():
                if parameter.requires_grad and parameter not in self._factors:
                    parameter.register_post_accumulate_grad_hook(self._square)

    def _forward(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        result = self.module(batch, **evaluation)
        if not torch.is_grad_enabled():
            # The root would stay gathered: no backward pass follows.
            cast(FSDPModule, self.module).reshard()
        return result

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self._is_last = is_last
        loss.backward()  # reduced and scattered each time: whole gradients would undo what sharding saves

    def _square(self, parameter: torch.Tensor) -> None:
        """Take the norm of a gradient that has just been reduced, while the backward pass continues."""
        if self._is_last:
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
            self._squares[parameter] = squared_norms([local(parameter.grad)])

    def _update(self) -> tuple[float, bool]:
        gradients = {p: local(p.grad) for p in self.module.parameters() if p.grad is not None}
        for parameter in self._factors.keys() & gradients.keys():
            gradients[parameter] *= self._factors[parameter]
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if gradients:
            square += sum_of_squares(gradients, self._squares)
        self._squares.clear()
        norm = self.sum_over_ranks(square).sqrt().float()
        value, skipped = float(norm), not bool(norm.isfinite())
        if not skipped:
            with self.clipped(list(gradients.values()), norm=norm):
                self._step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, skipped

    def _step(self) -> None:
        """Step all, first what the next forward pass needs first; that is gathered while the rest is stepped.

        No more is gathered than a forward pass holds at once: the whole model's parameters are what sharding saves.
        """
        if not self._ahead:
            self.optimizer.step()
            return
        self._drop_gathered()  # of the last step, where no forward pass has used it
        for module, parameters in self._ahead:
            step_only(self.optimizer, parameters)
            if self.world.world_size > 1:
                self._under_way[module] = module.unshard(async_op=True)  # the forward pass waits for it
        step_only(self.optimizer, self._rest)

    def _drop_gathered(self) -> None:
        """Wait for what is being gathered, unless a forward pass already has; keep only the shards."""
        for module, handle in self._under_way.items():
            handle.wait()
            module.reshard()
        self._under_way.clear()

    def _after_load(self) -> None:
        self._drop_gathered()  # it is no longer what the shards hold

    def _swap_averages(self) -> None:
        self._drop_gathered()  # before: a gather under way still reads the shards
        super()._swap_averages()

    def close(self) -> None:
        """Wait for what is under way: the other ranks may be."""
        self._drop_gathered()

    def local_shards(self) -> Iterator[LocalShard]:
        """Yield the rows of every parameter that this rank holds."""
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            rows = parameter.shape[0]
            # torch.chunk's rule, which FSDP2 follows: equal chunks, the last ones short or empty.
            chunk_rows = -(-rows // self.world.world_size)
            first_row = min(self.world.rank * chunk_rows, rows)
            row_numel = parameter.numel() // rows
            held = local(parameter).numel()
            yield LocalShard(name, tuple(parameter.shape), first_row * row_numel, held, parameter, 0)


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
