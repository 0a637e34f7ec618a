"""``engine=zero0`` to ``zero3_offload``: DeepSpeed partitions; our optimizer steps its flat fp32 partitions.

DeepSpeed replaces the parameters in the optimizer's groups by flat fp32 partitions (stages 1 to 3) and moves gradients
and parameters. This file knows where in those partitions each parameter lies, and nothing else of DeepSpeed's inside.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from anemoi_dist.data.batch import Batch
from anemoi_dist.engines.base import TensorInfo
from anemoi_dist.engines.regions import Region, RegionEngine, clip_coefficient
from anemoi_dist.engines.replicated import replicated_regions, step_replicated
from anemoi_dist.optimizers.ademamix import AdEMAMix


class _ZeroEngine(RegionEngine):
    """What all stages share: one DeepSpeed engine around the module and the optimizer of its configuration."""

    def _initialize(self, config: dict[str, Any]) -> None:
        deepspeed = _import_deepspeed()
        self._create_optimizer()
        initial = None
        if self.config.training.precision == "bf16" and "bf16" in config:
            self.module.compute_dtype = torch.bfloat16
            initial = _InitialWeights(self.module)
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        if initial is not None:
            # DeepSpeed takes its fp32 masters from the weights after it has rounded them to bf16.
            self._take(initial, num_updates=0)

    def _forward(self, batch: Batch, *, rollout: int) -> torch.Tensor:
        return self._engine(batch, rollout=rollout)

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # counts the micro-batch; the last one is stepped by _update

    def _base_config(self) -> dict[str, Any]:
        per_rank = self.config.training.global_batch_size // self.world.world_size
        micro = self.config.training.micro_batch_size or per_rank
        return {
            "train_batch_size": self.config.training.global_batch_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": per_rank // micro,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
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
        norm, skipped = step_replicated(self.optimizer, self.module, limit=self.config.training.clip_grad_norm)
        self._engine.micro_steps += 1  # what engine.step() would have counted
        return norm, skipped

    def regions(self) -> Iterator[Region]:
        """Yield every parameter whole."""
        yield from replicated_regions(self.module)


class _PartitionedEngine(_ZeroEngine):
    """Stages 1 to 3: the optimizer steps flat fp32 partitions."""

    # Muon needs matrices; Adagrad is rebuilt by DeepSpeed, which leaves ours and its schedule behind.
    refused_optimizers = (*RegionEngine.refused_optimizers, "Muon", "Adagrad")

    def _wrap(self) -> None:
        zero: dict[str, Any] = {"stage": self.config.engine.stage, "contiguous_gradients": True, "overlap_comm": False}
        if self.config.engine.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        config = self._base_config()
        zero |= config.pop("zero_optimization", {})
        config["zero_optimization"] = zero
        config["gradient_clipping"] = self.config.training.clip_grad_norm or 0.0
        if self.config.training.precision == "bf16":
            config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
        self._initialize(config)
        if isinstance(self.optimizer, AdEMAMix):
            # DeepSpeed calls it for each partition right before it steps that one; its own is a pass over the gradient.
            self._zero.unscale_and_clip_grads = self._scale_in_update

    def _scale_in_update(self, _: Any, norm: torch.Tensor) -> None:
        """Leave clipping to the update. There is no loss scale to undo: nothing runs in fp16."""
        limit = self.config.training.clip_grad_norm
        if limit is not None:
            assert isinstance(self.optimizer, AdEMAMix)
            self.optimizer.grad_scale = clip_coefficient(norm, limit).reciprocal()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _update(self) -> tuple[float, bool]:
        self._engine.step()
        vars(self.optimizer).pop("grad_scale", None)
        return float(self._engine.get_global_grad_norm()), bool(self._zero.overflow)

    def _frozen_regions(self) -> Iterator[Region]:
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                yield Region(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, replicated=True)


class Zero12Engine(_PartitionedEngine):
    """Stages 1 and 2: whole working parameters; each rank steps one equal piece of every group's flat copy."""

    def _wrap(self) -> None:
        super()._wrap()
        # DeepSpeed checks for overflow only in fp16. With this flag a norm that is not finite skips the update in any
        # precision; its own scan of all gradients is not needed for that.
        self._zero.check_grad_overflow = True
        self._zero.check_overflow = lambda partition_gradients=True: None

    def regions(self) -> Iterator[Region]:
        """Yield the pieces of parameters that lie in this rank's partitions, then what is frozen."""
        zero = self._zero
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            size = zero.partition_size[group]
            begin = self.world.rank * size
            partition = zero.single_partition_of_fp32_groups[group]
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                low, high = max(offset, begin), min(offset + parameter.numel(), begin + size)
                if low < high:
                    yield Region(
                        self._names[id(parameter)],
                        tuple(parameter.shape),
                        low - offset,
                        high - low,
                        partition,
                        low - begin,
                    )
        yield from self._frozen_regions()

    def _after_load(self) -> None:
        self._zero.update_lp_params()

    def _working_bytes(self) -> tuple[int, int]:
        master = sum(partition.nbytes for partition in self._zero.single_partition_of_fp32_groups)
        return sum(parameter.nbytes for parameter in self.module.parameters()), master


class Zero3Engine(_PartitionedEngine):
    """Stage 3: every parameter is cut into equal pieces, gathered when a submodule needs it."""

    def _update(self) -> tuple[float, bool]:
        report = super()._update()
        # DeepSpeed writes only the gradients that a step produces: a parameter that is not used in the next one would
        # be stepped with this one's again.
        self._zero.grad_partitions_flat_buffer.zero_()
        for partition in self._zero.fp32_partitioned_groups_flat:  # with offload they keep theirs on the CPU
            if partition.grad is not None:
                partition.grad.zero_()
        return report

    def _create_states(self) -> None:
        # Between steps the optimizer's groups are empty here; DeepSpeed puts one partition at a time into them.
        for index, partition in enumerate(self._zero.fp32_partitioned_groups_flat):
            group = self.optimizer.param_groups[self._zero.sub_group_to_group_id[index]]
            group["params"] = [partition]
            super()._create_states()
            group["params"] = []

    def regions(self) -> Iterator[Region]:
        """Yield this rank's piece of every parameter, then its piece of what is frozen."""
        zero = self._zero
        for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                if (region := self._piece(parameter, flat, offset)) is not None:
                    yield region
                offset += parameter.partition_numel()
        for parameter in self._parameters():
            if not parameter.requires_grad and (region := self._piece(parameter, parameter.ds_tensor, 0)) is not None:
                yield region

    def _parameters(self) -> list[Any]:
        """Return the module's parameters, which DeepSpeed has given the attributes ``ds_*``."""
        return list(self.module.parameters())

    def _piece(self, parameter: Any, owner: torch.Tensor, offset: int) -> Region | None:
        start = self.world.rank * parameter.partition_numel()
        numel = min(parameter.partition_numel(), parameter.ds_numel - start)  # the last piece is padded
        if numel <= 0:
            return None
        return Region(self._names[id(parameter)], tuple(parameter.ds_shape), start, numel, owner, offset)

    def _after_load(self) -> None:
        zero = self._zero
        if persistent := zero.persistent_parameters:  # gathered copies of small parameters: drop, then gather anew
            persistent[0].partition(persistent)
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _working_bytes(self) -> tuple[int, int]:
        parameters = self._parameters()
        working = sum(parameter.ds_tensor.nbytes for parameter in parameters)
        # Small parameters stay gathered between steps (stage3_param_persistence_threshold), beside their piece.
        working += sum(parameter.data.nbytes for parameter in parameters if parameter.ds_persist)
        flat = zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_partitioned_groups_flat, strict=True)
        return working, sum(master.nbytes for master, low in flat if master.data_ptr() != low.data_ptr())


class _InitialWeights:
    """The fp32 parameters and buffers of a module as they are now, as a source to load from."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._tensors = {(name, "param"): p.detach().clone() for name, p in module.named_parameters()}
        self._tensors |= {(name, "buffer"): b.detach().clone() for name, b in module.named_buffers()}

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        return {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        out.copy_(self._tensors[fqn, kind].reshape(-1)[start : start + out.numel()])


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly and without the parts that do harm on a CPU."""
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
