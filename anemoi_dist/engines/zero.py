"""``engine=zero0`` to ``zero3_offload``: DeepSpeed partitions, and our optimizer steps its flat fp32 partitions.

At stages 1 to 3 DeepSpeed replaces the parameters in the optimizer's groups by flat fp32 partitions, and moves
gradients and parameters. This module knows where in the partitions each parameter lies, and replaces the passes over
memory that DeepSpeed makes around an update. It relies on DeepSpeed's private names for that: the dependency is pinned
to one minor version, and ``tests/engines`` hold every stage against ``ddp``.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from anemoi_dist.checkpoint.shard import WholeTensors
from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.tree import Tree
from anemoi_dist.engines.memory_estimate import REDUCE_BUCKET
from anemoi_dist.engines.replicated import replicated_shards, step_replicated
from anemoi_dist.engines.sharded import LocalShard, ShardedEngine, step_only
from anemoi_dist.engines.zero_gradients import GradientPartitions
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers.norm import squared_norms
from anemoi_dist.tasks.base import Batch

#: With ``engine.overlap``: maximum buckets per partition, minimum elements per bucket. More
#: buckets begin to communicate earlier; smaller ones cost more in launches and latency than they hide.
NUM_BUCKETS = 8
BUCKET_NUMEL = 1 << 20


class _ZeroEngine(ShardedEngine):
    """Base of all stages: one DeepSpeed engine around the module and the optimizer of its configuration."""

    def _initialize(self, config: Tree) -> None:
        deepspeed = _import_deepspeed()
        self._create_optimizer()
        initial = None
        if self.config.training.precision == "bf16" and "bf16" in config:
            self.module.compute_dtype = torch.bfloat16
            tensors = {(name, "param"): p.detach().clone() for name, p in self.module.named_parameters()}
            tensors |= {(name, "buffer"): b.detach().clone() for name, b in self.module.named_buffers()}
            initial = WholeTensors(tensors)
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self._install_hooks()
        if initial is not None:
            # DeepSpeed takes its fp32 masters from the weights after it has rounded them to bf16.
            self._load_tensors(initial, num_updates=0)

    def _install_hooks(self) -> None:
        """Replace methods of DeepSpeed's optimizer by our own."""

    def _forward(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        return self._engine(batch, **evaluation)

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # counts the micro-batch; the last one is stepped by _update

    def _base_config(self) -> Tree:
        plan = plan_batches(self.config, world_size=self.world.world_size)
        return {
            # DeepSpeed counts every rank's samples, also where ranks share them.
            "train_batch_size": plan.rank_size * plan.world_size,
            "train_micro_batch_size_per_gpu": plan.micro_size,
            "gradient_accumulation_steps": plan.accumulation,
            # Any element-wise optimizer works on a flat partition; without these DeepSpeed refuses all but its own.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
            **self.config.engine.options,
        }

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers."""
        self._engine.destroy()


class Zero0Engine(_ZeroEngine):
    """Stage 0: DeepSpeed averages the gradients of whole fp32 parameters; ``bf16`` computes under autocast.

    DeepSpeed's own bf16 mode at stage 0 takes one optimizer step on zero gradients when it starts, which would shift
    AdEMAMix's schedules by one.
    """

    def _wrap(self) -> None:
        if self.config.training.precision == "bf16":
            self.module.autocast_dtype = torch.bfloat16
        self._initialize(self._base_config() | {"zero_optimization": {"stage": 0}})

    def _update(self) -> tuple[float, bool]:
        norm, skipped = step_replicated(self)
        self._engine.micro_steps += 1  # what engine.step() would have counted
        return norm, skipped

    def local_shards(self) -> Iterator[LocalShard]:
        """Yield every parameter whole."""
        yield from replicated_shards(self.module)


class _PartitionedEngine(_ZeroEngine):
    """Stages 1 to 3: the optimizer steps flat fp32 partitions."""

    # Muon needs matrices; Adagrad is rebuilt by DeepSpeed, which leaves ours and its schedule behind.
    refused_optimizers = (*ShardedEngine.refused_optimizers, "Muon", "Adagrad")

    def _wrap(self) -> None:
        zero: Tree = {"stage": self.config.engine.stage, "contiguous_gradients": True, "overlap_comm": False}
        if self.config.engine.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        config = self._base_config()
        zero |= self._zero_options() | config.pop("zero_optimization", {})
        config["zero_optimization"] = zero
        if self.config.training.precision == "bf16":
            # Summed in fp32: in bf16 the sum over ranks would lose what small gradients add to large ones.
            config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
        self._initialize(config)

    def _zero_options(self) -> Tree:
        """Return further settings of ``zero_optimization`` for this stage."""
        return {}

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _alias_masters(self, masters: Sequence[torch.Tensor], working: Sequence[torch.Tensor]) -> None:
        """Let fp32 working parameters be their own masters, where DeepSpeed keeps a copy of 4 bytes a parameter."""
        for master, own in zip(masters, working, strict=True):
            if own.dtype == master.dtype and own.device == master.device:
                master.data = own.data


@dataclass(frozen=True)
class _Bucket:
    """A range of this rank's flat partition that is stepped, and then communicated, at once.

    Attributes
    ----------
    index : int
        Number of the parameter group.
    begin : int
        First element of the range in the group's parameters laid end to end.
    parameter : torch.nn.Parameter
        The fp32 values.
    gradient : torch.Tensor
        Averaged gradient of the range.
    working : list[torch.Tensor]
        For each rank, the range at the same place of its partition, in the working parameters.
    is_own : bool
        This rank's working parameters are the memory of ``parameter``, not a copy of it.
    """

    index: int
    begin: int
    parameter: torch.nn.Parameter
    gradient: torch.Tensor
    working: list[torch.Tensor]
    is_own: bool


class Zero12Engine(_PartitionedEngine):
    """Stages 1 and 2: whole working parameters; each rank steps one equal partition of every group's flat copy.

    DeepSpeed averages the gradients and counts steps; norm, clipping, update and the gathering of parameters are done
    here. Its own step makes an fp32 copy of the gradients in fresh memory, scales it, and copies the parameters twice.
    """

    def _zero_options(self) -> Tree:
        # The same bytes on the wire with fewer copies: DeepSpeed's reduce_scatter is an all-reduce of a copy. Its
        # default bucket of 5e8 elements is allocated again in every backward pass, whatever the model's size.
        return {"reduce_scatter": False, "reduce_bucket_size": REDUCE_BUCKET}

    def _install_hooks(self) -> None:
        zero = self._zero
        key = "engine.options.zero_optimization"
        if not zero.contiguous_gradients:
            raise ConfigError(f"{key}.contiguous_gradients", False, "does not work with ZeRO 1 and 2", fix="remove it")
        if zero.cpu_offload:
            raise ConfigError(f"{key}.offload_optimizer", "cpu", "needs ZeRO stage 3", fix="engine=zero3_offload")
        overlap = self.config.engine.overlap
        gradients = [zero._build_compact_grad_partition_buffer(group) for group in range(len(zero.bit16_groups))]
        slices = [part for group in gradients for part in group if not getattr(part, "_zero_padding", False)]
        self._gradients = GradientPartitions(
            slices, is_last=lambda: bool(zero.is_gradient_accumulation_boundary()), eager=overlap
        )
        # DeepSpeed's path for gradients that add up in another type than the parameters': each is handed over once,
        # and lands in the flat buffer that the optimizer reads, instead of in a list that is flattened at the step.
        zero._use_compact_grad_partition_buffer = lambda group: True
        zero.averaged_gradients = dict(enumerate(gradients))
        zero._add_to_grad_partition_buffer = self._gradients.receive
        own = [partitions[self.world.rank] for partitions in zero.parallel_partitioned_bit16_groups]
        self._alias_masters(zero.single_partition_of_fp32_groups, own)
        zero._link_all_hp_params()  # DeepSpeed's own accessors would show the partitions and gradients of before
        self._buckets = list(self._cut(overlap=overlap))
        # The optimizer keys its states by these tensors. From here on they are never replaced, only written to.
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [bucket.parameter for bucket in self._buckets if bucket.index == index]
        self.capabilities.set_copies({b.parameter: b.working[self.world.rank] for b in self._buckets if not b.is_own})
        zero.step = self._step

    def _cut(self, *, overlap: bool) -> Iterator[_Bucket]:
        """Yield the buckets: each partition whole, or cut so that one is gathered while the next is stepped."""
        zero = self._zero
        for index, master in enumerate(zero.single_partition_of_fp32_groups):
            numel = master.numel()
            size = max(BUCKET_NUMEL, -(-numel // NUM_BUCKETS)) if overlap else numel
            for low in range(0, numel, size):
                here = slice(low, min(low + size, numel))
                working = [partition.detach()[here] for partition in zero.parallel_partitioned_bit16_groups[index]]
                yield _Bucket(
                    index=index,
                    begin=self.world.rank * numel + low,
                    parameter=torch.nn.Parameter(master.detach()[here]),
                    gradient=zero.averaged_gradients[index].flat_partition[here],
                    working=working,
                    is_own=working[self.world.rank].data_ptr() == master[here].data_ptr(),
                )

    def _update(self) -> tuple[float, bool]:
        self._engine.step()  # counts, and calls _step
        return self._norm, bool(self._zero.overflow)

    @torch.no_grad()
    def _step(self, closure: Any = None) -> None:
        """Take the global norm, then step or skip; it replaces the step of DeepSpeed's optimizer."""
        zero = self._zero
        # A rank whose partition got no gradient takes part all the same: a collective that one rank leaves out hangs.
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        own = self._gradients.sum_of_squares()
        if own is not None:
            square += own
        norm = self.sum_over_ranks(square).sqrt().float()
        self._norm = zero._global_grad_norm = float(norm)
        zero.overflow = not math.isfinite(self._norm)  # DeepSpeed counts skipped steps by it
        if not zero.overflow:
            self._step_buckets(norm)
        self._gradients.begin()

    def _step_buckets(self, norm: torch.Tensor) -> None:
        """Step each bucket and begin to gather its working parameters; wait for all of them at the end."""
        for bucket in self._buckets:
            self.capabilities.attach_grad(bucket.parameter, bucket.gradient)
        gradients = [bucket.parameter.grad for bucket in self._buckets if bucket.parameter.grad is not None]
        under_way: list[Any] = []
        with self.clipped(gradients, norm=norm):
            for bucket in self._buckets:
                step_only(self.optimizer, [bucket.parameter])
                bucket.parameter.grad = None
                self.capabilities.finish_copies(bucket.parameter)
                if self.world.world_size > 1:
                    under_way += self._begin_gather(bucket)
        for work in under_way:
            work.wait()

    def _begin_gather(self, bucket: _Bucket) -> list[Any]:
        """Begin to gather the other ranks' working parameters of a bucket; return the handles to wait for."""
        own = bucket.working[self.world.rank]
        if self.world.device.type == "cpu":
            # Where they belong: gloo's all-gather copies in and out. The bytes on the wire are the same.
            return [dist.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(bucket.working)]
        if self.config.engine.overlap:
            return [dist.all_gather(bucket.working, own, async_op=True)]
        return [dist.all_gather_into_tensor(self._zero.bit16_groups_flat[bucket.index], own, async_op=True)]

    def local_shards(self) -> Iterator[LocalShard]:
        """Yield the ranges of parameters that lie in this rank's partitions, then the frozen parameters."""
        zero = self._zero
        for bucket in self._buckets:
            parameters, offsets = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
            end = bucket.begin + bucket.parameter.numel()
            for parameter, offset in zip(parameters[bucket.index], offsets[bucket.index], strict=True):
                low, high = max(offset, bucket.begin), min(offset + parameter.numel(), end)
                if low < high:
                    yield LocalShard(
                        self._names[id(parameter)],
                        tuple(parameter.shape),
                        low - offset,
                        high - low,
                        bucket.parameter,
                        low - bucket.begin,
                    )
        yield from replicated_shards(self.module, frozen_only=True)

    def _after_load(self) -> None:
        self._zero.update_lp_params()

    def _working_bytes(self) -> tuple[int, int]:
        apart = sum(bucket.parameter.nbytes for bucket in self._buckets if not bucket.is_own)
        return sum(parameter.nbytes for parameter in self.module.parameters()), apart


class Zero3Engine(_PartitionedEngine):
    """Stage 3: every parameter is cut into equal shards, which are gathered when a submodule needs it.

    DeepSpeed goes through the flat partitions; the passes that it makes over each of them are left out here, or done
    in the update.
    """

    def _install_hooks(self) -> None:
        zero = self._zero
        self._rewrite = zero._reassign_or_swap_out_partitioned_parameters
        if not zero.offload_optimizer:  # else gradients are squared, and brought to the CPU, as they arrive
            self._alias_masters(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
            zero._prepare_fp32_grad_for_sub_group = self._attach_sub_group_grad
            zero._get_norm_groups = self._norms
        # DeepSpeed calls it for each partition right before it steps that one; its own is a pass over the gradient.
        zero.unscale_and_clip_grads = self._clip_sub_group
        if self.capabilities.is_fused and not zero.offload_optimizer:
            flat = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
            self.capabilities.set_copies({p: w for p, w in flat if w.data_ptr() != p.data_ptr()})
            # The shards are views of what the update has written; DeepSpeed would copy it again and make new views.
            zero._reassign_or_swap_out_partitioned_parameters = lambda sub_group: None

    def _clip_sub_group(self, sub_group: int, norm: torch.Tensor) -> None:
        """Clip a partition's gradient. There is no loss scale to undo: nothing runs in fp16."""
        self._clip([self._zero.fp32_partitioned_groups_flat[sub_group].grad], norm=norm)

    def _attach_sub_group_grad(self, sub_group: int) -> None:
        """Let a partition's gradient be its part of DeepSpeed's buffer, not an fp32 copy of that."""
        zero = self._zero
        partition = zero.fp32_partitioned_groups_flat[sub_group]
        self.capabilities.attach_grad(partition, self._gradients(sub_group))
        zero.averaged_gradients[sub_group] = None

    def _gradients(self, sub_group: int) -> torch.Tensor:
        """Return the part of DeepSpeed's gradient buffer that belongs to a partition."""
        sizes = [partition.numel() for partition in self._zero.fp32_partitioned_groups_flat]
        begin = sum(sizes[:sub_group])
        buffer: torch.Tensor = self._zero.grad_partitions_flat_buffer
        return buffer[begin : begin + sizes[sub_group]]

    def _norms(self) -> list[torch.Tensor]:
        """Return the norm of all gradients, in the place of DeepSpeed's list with one for each partition."""
        square = squared_norms([self._zero.grad_partitions_flat_buffer]).sum()
        return [self.sum_over_ranks(square).sqrt().float()]

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        # Nothing arrived yet: DeepSpeed overwrites, in this pass, the gradients of what it uses. Those of the rest
        # are an earlier step's, and would be stepped again or added to.
        is_first = not self._zero._offload_boundary_param_ids
        self._engine.backward(loss, scale_wrt_gas=False)
        if is_first:
            self._forget_all_but(self._zero._offload_boundary_param_ids)
        if not is_last:
            self._engine.step()

    def _forget_all_but(self, written: Collection[int]) -> None:
        """Zero the gradients of all parameters but those, by DeepSpeed's numbers, that have just been written."""
        for sub_group, parameters in enumerate(self._zero.fp16_groups):
            gradients, offset = self._gradients(sub_group), 0
            for parameter in parameters:
                numel = parameter.partition_numel()
                if parameter.ds_id not in written:
                    gradients[offset : offset + numel].zero_()
                offset += numel

    def _update(self) -> tuple[float, bool]:
        if self._zero.offload_optimizer:  # DeepSpeed takes the norm
            self.sum_over_ranks()
        self._engine.step()
        self.capabilities.reset_scale()
        # With offload the partitions keep their gradients, on the CPU: a parameter that the next step does not use
        # would be stepped with this one's.
        for partition in self._zero.fp32_partitioned_groups_flat:
            if partition.grad is not None:
                partition.grad.zero_()
        return float(self._engine.get_global_grad_norm()), bool(self._zero.overflow)

    def _create_states(self) -> None:
        # Between steps the optimizer's groups are empty here; DeepSpeed puts one partition at a time into them.
        for index, partition in enumerate(self._zero.fp32_partitioned_groups_flat):
            group = self.optimizer.param_groups[self._zero.sub_group_to_group_id[index]]
            group["params"] = [partition]
            super()._create_states()
            group["params"] = []

    def local_shards(self) -> Iterator[LocalShard]:
        """Yield this rank's shard of every trained parameter, then of the frozen ones."""
        zero = self._zero
        for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                if (shard := self._shard(parameter, flat, offset)) is not None:
                    yield shard
                offset += parameter.partition_numel()
        for parameter in self._parameters():
            if not parameter.requires_grad and (shard := self._shard(parameter, parameter.ds_tensor, 0)) is not None:
                yield shard

    def _parameters(self) -> list[Any]:
        """Return the module's parameters, which DeepSpeed has given the attributes ``ds_*``."""
        return list(self.module.parameters())

    def _shard(self, parameter: Any, owner: torch.Tensor, offset: int) -> LocalShard | None:
        start = self.world.rank * parameter.partition_numel()
        numel = min(parameter.partition_numel(), parameter.ds_numel - start)  # the last shard is padded
        if numel <= 0:
            return None
        return LocalShard(self._names[id(parameter)], tuple(parameter.ds_shape), start, numel, owner, offset)

    def _after_load(self) -> None:
        zero = self._zero
        # Gathered copies, of small parameters and of what an evaluation has left for a backward pass, are dropped.
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            self._rewrite(group)
        zero.checkpoint_event_epilogue()  # gathers the small ones again

    def _working_bytes(self) -> tuple[int, int]:
        parameters = self._parameters()
        working = sum(parameter.ds_tensor.nbytes for parameter in parameters)
        # Small parameters stay gathered between steps (stage3_param_persistence_threshold), in addition to their shard.
        working += sum(parameter.data.nbytes for parameter in parameters if parameter.ds_persist)
        flat = zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_partitioned_groups_flat, strict=True)
        return working, sum(master.nbytes for master, low in flat if master.data_ptr() != low.data_ptr())


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its warnings, and without its kernels for collectives on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated.*")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")  # it warns of every optimizer that is not its own
    # Its shared-memory collectives for CPUs need a compiler at run time and abort at exit now and then. By its full
    # name: the attribute ``deepspeed.comm.torch`` is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    return deepspeed
