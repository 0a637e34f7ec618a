"""Base of all engines: the optimizer step around an engine's own collectives, and saving and loading by shards.

An engine says where each parameter's elements lie on this rank (:class:`LocalShard`); the shards to save, the ranges
to load and the bytes to report follow from that.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from anemoi_dist.checkpoint.manifest import AVERAGE
from anemoi_dist.checkpoint.matching import FROM_ADAMW, TO_ADAMW, match
from anemoi_dist.checkpoint.shard import Shard, ShardSource, TensorInfo, persistent_buffers
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import MemoryReport, StepReport
from anemoi_dist.errors import CheckpointError, ConfigError
from anemoi_dist.optimizers.ademamix import conversions, schedule_values
from anemoi_dist.optimizers.ademamix_schedules import late_start
from anemoi_dist.optimizers.capabilities import Capabilities, capabilities
from anemoi_dist.optimizers.learning_rate import set_num_updates
from anemoi_dist.optimizers.rounding import ElementRange
from anemoi_dist.tasks.base import Batch, TaskModule
from anemoi_dist.tasks.rehearsal import buffer_shapes, check_buffers
from anemoi_dist.telemetry.heartbeat import beat


@dataclass(frozen=True)
class LocalShard:
    """Location of a contiguous range of one parameter on this rank.

    Attributes
    ----------
    fqn : str
        Name of the parameter in the module.
    global_shape : tuple[int, ...]
        Shape of the whole parameter.
    start, numel : int
        The range in the flattened parameter.
    owner : torch.Tensor
        The tensor that the optimizer steps and keys its state by: the parameter, or the flat partition it lies in.
    offset : int
        First element of the range in the flattened ``owner``.
    replicated : bool
        Every rank holds the whole parameter: each saves only its share.
    """

    fqn: str
    global_shape: tuple[int, ...]
    start: int
    numel: int
    owner: torch.Tensor
    offset: int
    replicated: bool = False

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the range as a 1-D view of ``tensor``, which is the owner or laid out like it."""
        return local(tensor).view(-1)[self.offset : self.offset + self.numel]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, any other tensor as it is; never with gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedEngine(ABC):
    """Base of all engines.

    Parameters
    ----------
    module : TaskModule
        On this rank's device, the same values on every rank.
    config : Config
        The run's configuration.
    world : World
        This rank's place.
    """

    optimizer: torch.optim.Optimizer
    capabilities: Capabilities
    #: torch's optimizers that cannot be right here: LBFGS calls the model again from inside its step, SparseAdam wants
    #: sparse gradients, and Adafactor's factored states are neither parameter-shaped nor element-wise.
    refused_optimizers: tuple[str, ...] = ("LBFGS", "SparseAdam", "Adafactor")

    def __init__(self, module: TaskModule, *, config: Config, world: World) -> None:
        self.module, self.config, self.world = module, config, world
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._num_parameters = sum(parameter.numel() for parameter in module.parameters())
        # As declared: engines change types and shapes, and no rank holds them all.
        self._declared = {(n, "param"): TensorInfo(tuple(p.shape), p.dtype) for n, p in module.named_parameters()}
        self._declared |= {
            (n, "buffer"): TensorInfo(tuple(b.shape), b.dtype) for n, b in persistent_buffers(module).items()
        }
        self._trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._num_updates = 0
        self._loss = torch.zeros((), device=world.device)
        #: The tensors that the optimizer steps -> average of their values, in fp32. Empty: none is kept.
        self._averages: dict[torch.Tensor, torch.Tensor] = {}
        self._install_gradient_factors()
        self._wrap()
        self._set_element_ranges()
        self._create_states()
        if config.training.weight_averaging.decay is not None:
            owners = dict.fromkeys(shard.owner for shard in self.local_shards() if shard.fqn in self._trained)
            self._averages = {owner: local(owner).clone() for owner in owners}
        set_num_updates(self._scheduler, 0)

    # Hooks that an engine fills in

    def _install_gradient_factors(self) -> None:
        """Let ``module.gradient_factors`` multiply gradients, before anything adds or squares them."""
        for name, factor in self.module.gradient_factors.items():
            self.module.get_parameter(name).register_hook(partial(torch.mul, other=factor))

    @abstractmethod
    def _wrap(self) -> None:
        """Spread ``self.module`` over the ranks; set ``self.optimizer`` and ``self._scheduler``."""

    @abstractmethod
    def _forward(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        """Call the module through whatever wraps it."""

    def _micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return what encloses the forward and backward pass of a micro-batch."""
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of ``loss`` (already divided by the number of micro-batches)."""

    @abstractmethod
    def _update(self) -> tuple[float, bool]:
        """Clip, step and clear the gradients. Return the global norm and whether the update was skipped."""

    @abstractmethod
    def local_shards(self) -> Iterator[LocalShard]:
        """Yield this rank's part of every parameter, trained or frozen, in the module's order."""

    def _after_load(self) -> None:  # noqa: B027, most engines have nothing to do
        """Rebuild what follows from the masters."""

    def _working_bytes(self) -> tuple[int, int]:
        """Return bytes of working parameters and of fp32 masters that are stored apart from them."""
        return sum(local(parameter).nbytes for parameter in self.module.parameters()), 0

    # Common to all engines

    def train_step(self, micro_batches: Sequence[Batch]) -> StepReport:
        """Do one optimizer step on this rank's micro-batches, then advance the learning rate. Collective."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        self._loss = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            beat()
            is_last = index == len(micro_batches) - 1
            with self._micro_batch(is_last=is_last):
                loss = self._forward(batch) / len(micro_batches)
                self._loss += loss.detach()
                if is_last:
                    # A loss that is not finite may leave finite gradients, here and elsewhere. Poisoned, they make the
                    # global norm tell every rank, and all skip together without a further collective.
                    loss = loss * torch.where(self._loss.isfinite(), 1.0, math.nan)
                self._backward(loss, is_last=is_last)
        grad_norm, skipped = self._update()
        if self._averages and not skipped:
            self._update_averages()
        self._num_updates += 1
        set_num_updates(self._scheduler, self._num_updates)
        return StepReport(loss=float(self._loss), grad_norm=grad_norm, lr=lr, skipped=skipped)

    @torch.no_grad()
    def evaluate(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        """Call the module without gradient, in evaluation mode. Collective."""
        self._agree_on_buffers()
        self.module.eval()
        result = self._forward(batch, **evaluation)
        self.module.train()
        return result

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let :meth:`evaluate` compute with the averaged weights inside of ``with``, if they are kept. Collective."""
        self._swap_averages()
        yield
        # Not after an error: this communicates, and the other ranks may be anywhere.
        self._swap_averages()

    def shards(self) -> Iterator[Shard]:
        """Yield the shards that this rank has to save; over all ranks each element comes once. Collective."""
        self._check_buffers()
        self._agree_on_buffers()
        for shard in self.local_shards():
            low, high = self._share(shard)
            for kind, tensor in self._tensors(shard):
                # A step counter has no elements to cut: the rank that holds the parameter's first element saves it.
                if tensor.dim() == 0 and shard.owner.dim() > 0:
                    if shard.start + low == 0 and high > low:
                        yield Shard(shard.fqn, kind, (), 0, tensor.view(1))
                elif high > low:
                    own = shard.view(tensor)[low:high]
                    yield Shard(shard.fqn, kind, shard.global_shape, shard.start + low, own)
        if self.world.is_main:
            for name, buffer in persistent_buffers(self.module).items():
                yield Shard(name, "buffer", tuple(buffer.shape), 0, buffer.detach().reshape(-1))

    def load(self, source: ShardSource, *, num_updates: int) -> None:
        """Load parameters, states and buffers from ``source`` and set the rate for update ``num_updates``.

        Raises
        ------
        CheckpointError
            The source does not fit the model; every rank gives the same report of all differences.
        """
        options = self.config.checkpoint
        matched = match(source, self._declared, rename=options.rename, allow_missing=options.allow_missing)
        if kinds := self.capabilities.state_kinds():
            rename = FROM_ADAMW if "exp_avg_slow" in kinds[0] else TO_ADAMW
            matched.select_states(kinds[0], rename, required=kinds[1])
        for note in [*matched.notes(), *self._notes_on_states(matched, num_updates), *self._notes_on_average(matched)]:
            warnings.warn(note, stacklevel=2)
        self._load_tensors(matched, num_updates=num_updates)

    @torch.no_grad()
    def _load_tensors(self, source: ShardSource, *, num_updates: int) -> None:
        """Load every tensor that ``source`` has; the others keep their values."""
        available = source.tensors()
        # A state whose every tensor is 0-d counts steps: under a flat partition one counter serves many parameters.
        kinds = sorted({kind for _, kind in available} - {"param", "buffer", AVERAGE})
        counters = {kind for kind in kinds if all(not i.global_shape for (_, k), i in available.items() if k == kind)}
        for shard in self.local_shards():
            if (shard.fqn, "param") in available:
                source.read(shard.fqn, "param", start=shard.start, out=shard.view(shard.owner))
            if (average := self._averages.get(shard.owner)) is not None:
                shard.view(average).copy_(shard.view(shard.owner))
                if (shard.fqn, AVERAGE) in available:
                    source.read(shard.fqn, AVERAGE, start=shard.start, out=shard.view(average))
            begins = self._begins(shard, available, kinds)
            for kind in kinds:
                if (shard.fqn, kind) in available:
                    self._load_state(source, shard, kind, is_counter=kind in counters)
                elif begins:
                    self._begin_state(source, shard, kind, is_counter=kind in counters)
        for name, buffer in persistent_buffers(self.module).items():
            if (name, "buffer") in available:
                # Through the CPU: a buffer need not be contiguous, and its type need not be the saved one.
                flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
                source.read(name, "buffer", start=0, out=flat)
                buffer.copy_(flat.view(buffer.shape))
        self._after_load()
        self._num_updates = num_updates
        set_num_updates(self._scheduler, num_updates)

    def memory(self) -> MemoryReport:
        """Count the bytes that this rank holds."""
        states: dict[str, int] = {}
        for kind, value in self._held_states():
            states[kind] = states.get(kind, 0) + local(value).nbytes
        if self._averages:
            states[AVERAGE] = sum(average.nbytes for average in self._averages.values())
        parameters, master = self._working_bytes()
        return MemoryReport(parameters=parameters, master=master, states=states)

    def num_parameters(self) -> int:
        """Count the elements of all parameters, over all ranks and frozen ones included."""
        return self._num_parameters

    def schedule_values(self) -> dict[str, float]:
        """Return step-dependent values of the optimizer worth showing, such as ``alpha`` and ``beta3``."""
        return schedule_values(self.optimizer)

    def close(self) -> None:  # noqa: B027
        """Release what the engine started."""

    # Helpers

    def sum_over_ranks(self, square: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum of ``square`` (a scalar) over all ranks; the step's loss becomes their mean on the same way.

        Collective. Every engine calls it once a step, after the backward pass, which nothing holds up.
        """
        loss = self._loss.double()
        both = torch.stack([torch.zeros_like(loss) if square is None else square.double(), loss])
        dist.all_reduce(both)
        self._loss = (both[1] / self.world.world_size).float()
        return both[0]

    @contextmanager
    def clipped(self, gradients: Sequence[torch.Tensor], *, norm: torch.Tensor) -> Iterator[None]:
        """Clip ``gradients``, of global L2 ``norm``, for the optimizer steps in here: in its update or in a pass."""
        self._clip(gradients, norm=norm)
        try:
            yield
        finally:
            self.capabilities.reset_scale()

    def _clip(self, gradients: Sequence[torch.Tensor], *, norm: torch.Tensor) -> None:
        limit, largest = self.config.training.clip_grad_norm, self.config.training.clip_grad_value
        if largest is not None:
            for gradient in gradients:
                gradient.clamp_(-largest, largest)
        elif limit is not None and float(norm) > limit:
            self.capabilities.scale_gradients(gradients, limit / (norm + 1e-6))

    @torch.no_grad()
    def _update_averages(self) -> None:
        """Move the averages towards the weights; after the first update they are the weights, as in torch."""
        decay = self.config.training.weight_averaging.decay
        assert decay is not None
        weights = [local(owner) for owner in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay if self._num_updates else 1.0)

    @torch.no_grad()
    def _swap_averages(self) -> None:
        """Exchange weights and averages, bit for bit; twice changes nothing. Collective."""
        if self.config.training.weight_averaging.decay is None:
            return
        for owner, average in self._averages.items():
            weights = local(owner).clone()
            local(owner).copy_(average)
            average.copy_(weights)
        self._after_load()

    def _create_optimizer(self) -> None:
        created = self.module.configure_optimizers()
        self.optimizer = created["optimizer"]
        kind = type(self.optimizer)
        if kind.__module__.startswith("torch.optim") and kind.__name__ in self.refused_optimizers:
            raise ConfigError(
                "training.optimizer._target_",
                f"{kind.__module__}.{kind.__qualname__}",
                f"does not work with engine={self.config.engine.spec.name}",
                fix="take an element-wise optimizer (AdEMAMix, AdamW, SGD, ...)",
            )
        self.capabilities = capabilities(self.optimizer)
        if self.config.engine.overlap and not self.capabilities.counts_per_parameter:
            raise ConfigError(
                "engine.overlap",
                True,
                f"steps a part of the parameters at a time, and {kind.__module__}.{kind.__qualname__} may count the "
                "steps of all together",
                fix="engine.overlap=false, AdEMAMix or an optimizer of torch",
            )
        self._scheduler = created["lr_scheduler"]["scheduler"] if "lr_scheduler" in created else None

    def _create_states(self) -> None:
        """Let the optimizer allocate now: what does not fit fails here, and memory() is right from the start."""
        self.capabilities.allocate_states()

    def _set_element_ranges(self) -> None:
        """Tell the optimizer which parameters' elements it steps: what it rounds at random must not depend on ranks."""
        held: dict[torch.Tensor, list[ElementRange]] = {}
        for shard in self.local_shards():
            if shard.fqn in self._trained:
                element_range = ElementRange(shard.fqn, shard.offset, shard.start, shard.numel)
                held.setdefault(shard.owner, []).append(element_range)
        for owner, ranges in held.items():
            self.capabilities.set_element_ranges(owner, ranges, seed=self.config.run.seed)

    def _held_states(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and tensor of each optimizer state that is there now."""
        for state in self.optimizer.state.values():
            yield from ((kind, value) for kind, value in state.items() if isinstance(value, torch.Tensor))

    def _share(self, shard: LocalShard) -> tuple[int, int]:
        if not shard.replicated:
            return 0, shard.numel
        rank, size = self.world.rank, self.world.world_size
        return shard.numel * rank // size, shard.numel * (rank + 1) // size

    def _tensors(self, shard: LocalShard) -> Iterator[tuple[str, torch.Tensor]]:
        yield "param", shard.owner
        if shard.owner in self._averages:
            yield AVERAGE, self._averages[shard.owner]
        for kind, value in sorted(self.optimizer.state.get(shard.owner, {}).items()):
            if not isinstance(value, torch.Tensor):
                continue
            if value.dim() > 0 and local(value).numel() != local(shard.owner).numel():
                raise ConfigError(
                    "training.optimizer",
                    kind,
                    f"this optimizer state has shape {tuple(value.shape)} for a parameter of shape "
                    f"{shard.global_shape}; only states of the parameter's shape and counters can be saved",
                    fix="use an element-wise optimizer (AdEMAMix, AdamW, SGD, ...)",
                )
            yield kind, value

    def _notes_on_states(self, source: ShardSource, num_updates: int) -> list[str]:
        """Return notes on states that start at zero while others are restored, or that change their type."""
        saved: dict[str, set[torch.dtype]] = {}
        for (_, kind), info in source.tensors().items():
            if kind not in ("param", "buffer", AVERAGE):
                saved.setdefault(kind, set()).add(info.dtype)
        held: dict[str, set[torch.dtype]] = {}
        for kind, value in self._held_states():
            held.setdefault(kind, set()).add(value.dtype)
        absent = sorted(held.keys() - saved.keys())
        notes = conversions(saved, held)
        if not saved or not absent:
            return notes
        note = f"the checkpoint has no {', '.join(absent)}: they start at zero"
        if "exp_avg_slow" in absent:
            note += late_start(self.optimizer.param_groups[0], num_updates=num_updates)
        return [*notes, note]

    def _notes_on_average(self, source: ShardSource) -> list[str]:
        is_saved = any(kind == AVERAGE for _, kind in source.tensors())
        is_kept = self.config.training.weight_averaging.decay is not None
        if is_saved == is_kept:
            return []
        if is_kept:
            return ["the checkpoint has no averaged weights: the average starts from its weights"]
        return ["the averaged weights of the checkpoint are left out (training.weight_averaging.decay)"]

    def _begins(self, shard: LocalShard, available: Mapping[tuple[str, str], TensorInfo], kinds: Sequence[str]) -> bool:
        """Whether the optimizer's state of a parameter starts at zero: it is new, or was frozen."""
        if shard.fqn not in self._trained or any((shard.fqn, kind) in available for kind in kinds):
            return False
        # An optimizer that creates states at the first gradient has not met one: it still creates it then.
        return (shard.fqn, "param") not in available or self.capabilities.has_all_states

    def _begin_state(self, source: ShardSource, shard: LocalShard, kind: str, *, is_counter: bool) -> None:
        """Start a state that the checkpoint does not have for this parameter: EMA states at zero, at the others' step.

        Partitioned engines keep one counter for many parameters, so all do alike.
        """
        other = next(fqn for fqn, found in source.tensors() if found == kind)
        if is_counter:
            self._load_state(source, replace(shard, fqn=other), kind, is_counter=True)
        elif kind not in self.optimizer.state[shard.owner]:
            dtype = source.tensors()[other, kind].dtype
            self.optimizer.state[shard.owner][kind] = torch.zeros_like(shard.owner, dtype=dtype, requires_grad=False)

    def _load_state(self, source: ShardSource, shard: LocalShard, kind: str, *, is_counter: bool) -> None:
        state = self.optimizer.state[shard.owner]
        info = source.tensors()[shard.fqn, kind]
        if is_counter:
            # torch's own optimizers count in float32, AdEMAMix in float64.
            is_narrow = info.dtype == torch.float64 and not self.capabilities.is_fused
            value = torch.empty(1, dtype=torch.float32 if is_narrow else info.dtype)
            source.read(shard.fqn, kind, start=0, out=value)
            # torch keeps counters on the CPU but where a kernel or a captured graph reads them.
            on_device = any(group.get("capturable") or group.get("fused") for group in self.optimizer.param_groups)
            state[kind] = value.view(()).to(shard.owner.device if on_device else "cpu")
            return
        self._check_shape(shard, info.global_shape)
        if kind not in state:
            dtype = torch.promote_types(info.dtype, shard.owner.dtype)  # AdEMAMix's may be bfloat16
            state[kind] = torch.zeros_like(shard.owner, dtype=dtype, requires_grad=False)
        source.read(shard.fqn, kind, start=shard.start, out=shard.view(state[kind]))

    def _check_shape(self, shard: LocalShard, shape: tuple[int, ...]) -> None:
        if tuple(shape) != shard.global_shape:
            raise CheckpointError(
                f"{shard.fqn} has shape {tuple(shape)} in the checkpoint and {shard.global_shape} in the model"
            )

    def _check_buffers(self) -> None:
        """Refuse buffers that are no longer what they were: what is saved of them could not be loaded."""
        declared = {name: info.global_shape for (name, kind), info in self._declared.items() if kind == "buffer"}
        check_buffers(declared, buffer_shapes(self.module))

    def _agree_on_buffers(self) -> None:
        """Broadcast rank 0's buffers: running statistics of each rank's own samples differ, and one copy is saved."""
        for buffer in persistent_buffers(self.module).values():
            dist.broadcast(buffer, src=0)


def step_only(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Step some of the optimizer's parameters.

    The group dictionaries themselves stay in place, since the scheduler sets the rate in them.
    """
    wanted, groups = set(parameters), optimizer.param_groups
    every = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter in wanted]
        optimizer.param_groups = [group for group in groups if group["params"]]
        if optimizer.param_groups:
            optimizer.step()
    finally:
        optimizer.param_groups = groups
        for group, params in zip(groups, every, strict=True):
            group["params"] = params
