"""Build the engine that the configuration chooses."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anemoi_dist.checkpoint.shard import DTYPE_NAMES, persistent_buffers
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import Engine
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks.base import TaskModule


def create_engine(module: TaskModule, *, config: Config, world: World) -> Engine:
    """Spread a module over the ranks. Collective.

    Parameters
    ----------
    module : TaskModule
        Built from the same seed on every rank; moved to the rank's device here.
    config : Config
        The run's configuration; ``engine`` chooses.
    world : World
        This rank's place.

    Raises
    ------
    ConfigError
        A parameter is of a kind that cannot be cut into ranges.
    """
    _check_parameters(module, config)
    module.to(world.device)
    module.train()
    # Imported only when chosen: DeepSpeed alone costs every rank most of a second.
    module_name, class_name = config.engine.spec.target.split(":")
    engine: Callable[..., Engine] = getattr(importlib.import_module(module_name), class_name)
    return engine(module, config=config, world=world)


def check_state(module: nn.Module) -> None:
    """Refuse by name what torch counts as state and a checkpoint does not hold.

    Raises
    ------
    ConfigError
        A parameter or buffer has no shape yet, a buffer is of a type without a name in safetensors, or a module keeps
        state of its own.
    """
    for name, layer in module.named_modules():
        if type(layer).get_extra_state is not nn.Module.get_extra_state:
            rule = f"({type(layer).__name__}) keeps state by get_extra_state, which checkpoints do not hold"
            raise ConfigError("model", name, rule, fix="register_buffer(name, tensor) for what must be kept")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            rule = "has no shape before the first forward pass (a lazy layer)"
            raise ConfigError("model", name, rule, fix="the layer with its sizes, such as Linear for LazyLinear")
    for name, tensor in persistent_buffers(module).items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_quantized:
            rule = f"is a buffer of {tensor.dtype}, {tensor.layout}, which checkpoints do not hold"
            fix = "persistent=False if it follows from the configuration, or torch.view_as_real(tensor) as the buffer"
            raise ConfigError("model", name, rule, fix=fix)


def _check_parameters(module: TaskModule, config: Config) -> None:
    """Refuse by name what some engine or the checkpoint could not hold; lay out the rest row by row."""
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        rule = ""
        if parameter.dim() == 0:
            rule = "has no dimension to cut along"
        elif parameter.numel() == 0:
            rule = "has no element"
        elif parameter.dtype != torch.float32:
            rule = f"is {parameter.dtype}: parameters start as float32, and training.precision chooses what computes"
        if rule:
            raise ConfigError("model", name, rule, fix="torch.nn.Parameter(torch.zeros(1)), float32, for a scalar")
        parameter.data = parameter.data.contiguous()  # ranges are of the flattened tensor, row by row
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("model", config.model["_target_"], "has no parameter that takes a gradient")
