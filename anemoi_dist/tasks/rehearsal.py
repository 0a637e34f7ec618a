"""One forward and backward pass of a copy of the module, before anything is spread over ranks or trained."""

from __future__ import annotations

import copy

import torch
from torch import nn

from anemoi_dist.checkpoint.shard import persistent_buffers
from anemoi_dist.config.schema import Config
from anemoi_dist.errors import AnemoiDistError, ConfigError
from anemoi_dist.tasks.base import Task, TaskModule


def rehearse(task: Task, module: TaskModule, config: Config, *, device: torch.device) -> None:
    """Refuse a model that the first step or the first save would refuse.

    Parameters
    ----------
    task : Task
        Its first training sample is the input.
    module : TaskModule
        It is left as it is.
    config : Config
        For the name of the model.
    device : torch.device
        The rank's; ``meta`` computes shapes alone, as far as the model's operations permit that.

    Raises
    ------
    ConfigError
        The model cannot take the input, gives a wrong output or a sparse gradient, or changes what it keeps.
    """
    if not module.rehearses:
        return
    try:
        trial = copy.deepcopy(module).to(device).train()
        batch = task.collate([task.samples("train").read(0, step=0)]).to(device)
    except (torch.OutOfMemoryError, TypeError, RuntimeError):  # no room for a second model, or it cannot be copied
        return
    target = config.model["_target_"]
    before = buffer_shapes(trial)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            loss = trial(batch)
            if loss.requires_grad:  # all is frozen otherwise, which the engine refuses
                loss.backward()
    except (AnemoiDistError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if device.type == "meta":  # an operation that cannot do without values says nothing about the model
            return
        rule = f"fails on the first sample: {type(error).__name__}: {error}"
        raise ConfigError("model._target_", target, rule, fix="a model that takes the shape of this data") from error
    for name, parameter in trial.named_parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ConfigError("model", name, "has a sparse gradient, which no engine reduces", fix="sparse=False")
    check_buffers(before, buffer_shapes(trial))


def buffer_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every buffer that is saved."""
    return {name: tuple(buffer.shape) for name, buffer in persistent_buffers(module).items()}


def check_buffers(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> None:
    """Refuse buffers that appear, vanish or change their shape: what is saved of them could not be loaded.

    Raises
    ------
    ConfigError
        Names the first of them.
    """
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was != now:
            raise ConfigError(
                "model",
                name,
                f"is a buffer of shape {was} before the first forward pass and {now} after it: what is saved of it "
                "could not be loaded",
                fix="register it in the constructor with its final shape, or with persistent=False",
            )
