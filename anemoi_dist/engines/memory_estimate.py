"""Estimate of the bytes that a rank is going to hold, by the engines' own rules for sharding. Pure, without torch.

The control side plans with it before anyone queues; ``tests/engines/test_memory_estimate.py`` compares it with what
every engine holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from anemoi_dist.checkpoint.manifest import AVERAGE
from anemoi_dist.config.optimizer_states import is_ademamix, narrow_states
from anemoi_dist.config.schema import Config, EngineConfig, TrainingConfig
from anemoi_dist.config.tree import Tree

_FP32, _BF16 = 4, 2

#: Elements of the bucket that gradients are reduced in at ZeRO 1 and 2, unless ``engine.options`` says otherwise.
REDUCE_BUCKET = 1 << 25
#: DeepSpeed's defaults, in elements, unless ``engine.options`` says otherwise.
_REDUCE_BUCKET = 500_000_000
_PERSISTENCE_THRESHOLD = 100_000
_SUB_GROUP = 1_000_000_000

#: Memory that :class:`ExpectedMemory` leaves out.
NOT_COUNTED = (
    "activations, layers gathered while they compute (zero3, fsdp2), NCCL's and cuBLAS' work space, the CUDA context, "
    "allocator fragmentation"
)

_ADAM = ("exp_avg", "exp_avg_sq")
#: States of the optimizers that are element-wise, in the shape of the parameter.
_STATES: Mapping[str, tuple[str, ...]] = {
    "torch.optim.Adam": _ADAM,
    "torch.optim.AdamW": _ADAM,
    "torch.optim.NAdam": _ADAM,
    "torch.optim.RAdam": _ADAM,
    "torch.optim.Adamax": ("exp_avg", "exp_inf"),
    "torch.optim.Adadelta": ("square_avg", "acc_delta"),
    "torch.optim.Adagrad": ("sum",),
    "torch.optim.ASGD": ("ax",),
    "torch.optim.RMSprop": ("square_avg",),
    "torch.optim.Rprop": ("prev", "step_size"),
    "torch.optim.SGD": (),
}


@dataclass(frozen=True)
class Parameter:
    """Shape of one parameter, and whether it takes a gradient."""

    shape: tuple[int, ...]
    trained: bool = True

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model that memory depends on.

    Attributes
    ----------
    parameters : Sequence[Parameter]
        In any order.
    buffer_bytes : int
        Bytes of all buffers, which every rank holds whole.
    largest_layer : tuple[str, int], optional
        Name and number of parameters of the module that holds most by itself.
    """

    parameters: Sequence[Parameter]
    buffer_bytes: int = 0
    largest_layer: tuple[str, int] | None = None

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, frozen ones included."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class ExpectedMemory:
    """Bytes that the fullest rank holds at once, at most; what is left out is in :data:`NOT_COUNTED`.

    Attributes
    ----------
    parameters : int
        Working parameters, between two steps.
    master : int
        fp32 masters apart from them.
    states : Mapping[str, int]
        Optimizer states by name, without those of an unknown optimizer, and the average of the weights.
    gradients : int
        When a backward pass has ended.
    update : int
        Copies of gradients in fp32, which the update reads.
    communication : int
        Buckets that gradients are reduced in.
    buffers : int
        The model's buffers.
    staging : int
        Copy of a checkpoint's contents in host memory.
    offloaded : bool
        Masters, states, gradients and their copies lie in host memory too.
    """

    parameters: int
    master: int = 0
    states: Mapping[str, int] = field(default_factory=dict)
    gradients: int = 0
    update: int = 0
    communication: int = 0
    buffers: int = 0
    staging: int = 0
    offloaded: bool = False

    @property
    def movable(self) -> int:
        """Bytes that ``engine.offload`` moves to the host."""
        return self.master + sum(self.states.values()) + self.gradients + self.update

    @property
    def device(self) -> int:
        """Bytes in the memory of the device."""
        return self.parameters + self.communication + self.buffers + (0 if self.offloaded else self.movable)

    @property
    def host(self) -> int:
        """Bytes in the memory of the host."""
        return self.staging + (self.movable if self.offloaded else 0)


def state_bytes(optimizer: Tree) -> dict[str, int] | None:
    """Return the bytes of each optimizer state for one element, without counters; None for an unknown optimizer.

    Parameters
    ----------
    optimizer : Tree
        ``training.optimizer``.
    """
    if is_ademamix(optimizer):
        betas = optimizer.get("betas")
        has_fast = not isinstance(betas, Sequence) or not betas or bool(betas[0])
        names = (("exp_avg_fast",) if has_fast else ()) + ("exp_avg_slow", "exp_avg_sq")
        narrow = narrow_states(optimizer.get("state_dtype", "fp32"))
        return {name: _BF16 if name in narrow else _FP32 for name in names}
    # torch.optim.adamw.AdamW is torch.optim.AdamW.
    package, _, name = str(optimizer.get("_target_")).rpartition(".")
    known = f"torch.optim.{name}"
    if known not in _STATES or not (package == "torch.optim" or package == f"torch.optim.{name.lower()}"):
        return None
    names = _STATES[known]
    if optimizer.get("amsgrad"):
        names = (*names, "max_exp_avg_sq")
    if optimizer.get("centered"):
        names = (*names, "grad_avg")
    if optimizer.get("momentum"):
        names = (*names, "momentum_buffer")
    return dict.fromkeys(names, _FP32)


def expected_memory(config: Config, model: ModelSize, *, world_size: int, rank: int = 0) -> ExpectedMemory:
    """Return the bytes that one rank is going to hold.

    Parameters
    ----------
    config : Config
        ``engine``, ``training.precision``, ``training.optimizer`` and ``checkpoint.asynchronous`` count.
    model : ModelSize
        The model.
    world_size : int
        Data-parallel ranks.
    rank : int
        Only FSDP2's ranks differ, and rank 0 holds the most.
    """
    cut = _cut(config.engine)
    states = state_bytes(config.training.optimizer) or {}
    if config.training.weight_averaging.decay is not None:
        states[AVERAGE] = _FP32
    held = cut(config, model.parameters, world_size, rank)
    return ExpectedMemory(
        parameters=held.parameters,
        master=held.master,
        states={name: held.stepped * each for name, each in states.items()},
        gradients=held.gradients,
        update=held.update,
        communication=held.communication,
        buffers=model.buffer_bytes,
        staging=(held.saved * (_FP32 + sum(states.values())) + held.saved_frozen) * config.checkpoint.asynchronous,
        offloaded=config.engine.offload,
    )


@dataclass(frozen=True)
class _Held:
    """Bytes on one rank, and the elements that states are multiplied with."""

    parameters: int
    #: Elements that the optimizer steps here, padding included.
    stepped: int
    #: Elements that this rank saves, at most.
    saved: int
    saved_frozen: int
    gradients: int
    master: int = 0
    update: int = 0
    communication: int = 0


def _replicated(config: Config, parameters: Sequence[Parameter], world_size: int, rank: int) -> _Held:
    """``ddp`` and ``zero0``: everything whole and in fp32, each rank saves its share."""
    trained, frozen = _count(parameters)
    return _Held(
        parameters=_FP32 * (trained + frozen),
        stepped=trained,
        saved=_ceil(trained, world_size),
        saved_frozen=_FP32 * _ceil(frozen, world_size),
        gradients=_FP32 * trained,
        # DDP's reducer holds every gradient once more; DeepSpeed flattens up to one bucket at a time.
        communication=_FP32 * (trained if config.engine.kind == "ddp" else min(trained, _REDUCE_BUCKET)),
    )


def _zero12(config: Config, parameters: Sequence[Parameter], world_size: int, rank: int) -> _Held:
    """Stages 1 and 2: whole working parameters, one equal partition of a flat copy, padded to two elements a rank."""
    trained, frozen = _count(parameters)
    working = _working(config.training)
    partition = 2 * _ceil(trained, 2 * world_size)
    return _Held(
        parameters=working * (trained + frozen),
        master=_master(config, partition),
        stepped=partition,
        saved=min(partition, trained),
        saved_frozen=working * _ceil(frozen, world_size),
        # Stage 1 reduces when the backward pass has ended, stage 2 while it runs.
        gradients=working * (partition + (0 if "gradients" in config.engine.spec.partitioned else trained)),
        update=_copy(config, partition),
        communication=working * _zero_option(config.engine, "reduce_bucket_size", REDUCE_BUCKET),
    )


def _zero3(config: Config, parameters: Sequence[Parameter], world_size: int, rank: int) -> _Held:
    """Stage 3: an equal shard of every parameter; small parameters also stay gathered."""
    working = _working(config.training)
    threshold = _zero_option(config.engine, "stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)
    shards = {flag: sum(_ceil(p.numel, world_size) for p in parameters if p.trained == flag) for flag in (True, False)}
    gathered = sum(p.numel for p in parameters if p.numel <= threshold)
    shard = shards[True]
    return _Held(
        parameters=working * (shard + shards[False] + gathered),
        master=_master(config, shard),
        stepped=shard,
        saved=shard,
        saved_frozen=working * shards[False],
        gradients=working * shard,
        # One sub-group at a time, but on the host all stay.
        update=_FP32 * shard if config.engine.offload else _copy(config, min(shard, _SUB_GROUP)),
        communication=_FP32 * _zero_option(config.engine, "reduce_bucket_size", _REDUCE_BUCKET),
    )


def _fsdp2(config: Config, parameters: Sequence[Parameter], world_size: int, rank: int) -> _Held:
    """Rows of every parameter in fp32, as torch.chunk deals them: equal chunks, the last ones short or empty."""
    held = {True: 0, False: 0}
    padded = 0
    for parameter in parameters:
        rows = parameter.shape[0]
        row, chunk = parameter.numel // rows, _ceil(rows, world_size)
        held[parameter.trained] += row * max(0, min(chunk, rows - rank * chunk))
        padded += row * chunk * parameter.trained
    return _Held(
        parameters=_FP32 * (held[True] + held[False]),
        stepped=held[True],
        saved=held[True],
        saved_frozen=_FP32 * held[False],
        gradients=_FP32 * padded,
    )


def _cut(engine: EngineConfig) -> Callable[[Config, Sequence[Parameter], int, int], _Held]:
    if engine.kind == "fsdp2":
        return _fsdp2
    partitioned = engine.spec.partitioned
    return _zero3 if "parameters" in partitioned else _zero12 if partitioned else _replicated


def _count(parameters: Sequence[Parameter]) -> tuple[int, int]:
    trained = sum(parameter.numel for parameter in parameters if parameter.trained)
    return trained, sum(parameter.numel for parameter in parameters) - trained


def _working(training: TrainingConfig) -> int:
    """Return the bytes of a working parameter of ZeRO 1 to 3; the other engines keep fp32."""
    return _BF16 if training.precision == "bf16" else _FP32


def _master(config: Config, numel: int) -> int:
    """Return the bytes of masters: fp32 working parameters are their own, unless those lie on the host."""
    return 0 if config.training.precision == "fp32" and not config.engine.offload else _FP32 * numel


def _copy(config: Config, numel: int) -> int:
    """Return the bytes of an fp32 copy of gradients: only AdEMAMix takes those in bf16 as they are."""
    return 0 if config.training.precision == "fp32" or is_ademamix(config.training.optimizer) else _FP32 * numel


def _zero_option(engine: EngineConfig, name: str, default: int) -> int:
    options = engine.options.get("zero_optimization")
    value = options.get(name, default) if isinstance(options, Mapping) else default
    return int(value) if isinstance(value, int | float) else default


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)
