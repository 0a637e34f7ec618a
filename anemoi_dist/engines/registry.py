"""Build the engine that the configuration chooses."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

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
