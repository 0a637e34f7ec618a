"""Training module: model, normalisation, rollout, loss, optimizer and learning rate.

Plain PyTorch: engines wrap it, Lightning may drive it (``lightning.py``), and neither is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anemoi_dist.config.instantiate import check_arguments, split_node
from anemoi_dist.config.schema import Config
from anemoi_dist.config.targets import nested_targets, resolve_target
from anemoi_dist.config.tree import Tree
from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks.base import KeepsBufferTypes, TaskModule


class Float32Constants(KeepsBufferTypes):
    """Named constants that follow the module from device to device and stay float32.

    They come from the data, not from training, so they are not part of the state that is saved.

    Parameters
    ----------
    values : numpy.ndarray
        One array for each name.
    """

    mean: Tensor
    stdev: Tensor
    tendency_scale: Tensor
    area_weight: Tensor

    def __init__(self, **values: np.ndarray) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value), dtype=torch.float32), persistent=False)


class BaseGraphModule(TaskModule):
    """Model and loss of one configuration.

    Parameters
    ----------
    config : Config
        The whole configuration; ``model``, ``training`` and ``security`` are used.
    spec : DataSpec
        Variables, grid and statistics of the dataset.
    world_size : int
        Data-parallel ranks, for ``training.lr.scale_with: world_size``.

    Attributes
    ----------
    model : torch.nn.Module
        Normalised states (batch, time, ensemble, grid, variable) to the normalised tendency
        (batch, ensemble, grid, prognostic variable).
    """

    def __init__(self, config: Config, *, spec: DataSpec, world_size: int = 1) -> None:
        super().__init__(config, world_size=world_size)
        self.spec = spec
        self.model = build_model(config.model, spec, self.allowed_targets)
        self.constants = _constants(spec)
        # Not persistent: it follows from the dataset and belongs to no checkpoint.
        self._prognostic: Tensor
        self.register_buffer("_prognostic", torch.tensor(spec.prognostic_indices), persistent=False)

    def forward(self, batch: Batch, *, rollout: int | None = None) -> Tensor:  # type: ignore[override]
        """Return the loss of a batch; with ``rollout``, its forecast in physical units.

        Parameters
        ----------
        batch : Batch
            Physical units. For the loss with the true states of ``training.rollout`` forecast steps.
        rollout : int, optional
            Steps to forecast.

        Returns
        -------
        torch.Tensor
            float32: a scalar, or shape (batch, rollout, ensemble, grid, prognostic variable).
        """
        if rollout is not None:
            return self.denormalise(self.forecast(batch, rollout=rollout))
        return self.loss(self.forecast(batch, rollout=self.config.training.rollout), batch)

    def forecast(self, batch: Batch, *, rollout: int) -> Tensor:
        """Forecast ``rollout`` steps, each from the forecasts before it and the true forcings of its date.

        Parameters
        ----------
        batch : Batch
            Physical units. Only the forcings of the states after the input are read.
        rollout : int
            Steps to forecast; ``batch`` must hold the states that belong to all but the last.

        Returns
        -------
        torch.Tensor
            float32, normalised, shape (batch, rollout, ensemble, grid, prognostic variable).
        """
        num_input = self.spec.multistep_input
        num_needed = num_input + rollout - 1
        if rollout < 1 or batch.fields.shape[1] < num_needed:
            raise ValueError(
                f"rollout={rollout}: must be at least 1 and needs {num_needed} states (input and forcings), "
                f"the batch has {batch.fields.shape[1]}"
            )
        # The whole window at once; the truth of the last step is never needed as input.
        states = self.normalise(batch.fields[:, :num_needed])
        window, forecasts = states[:, :num_input], []
        for step in range(rollout):
            # The model forecasts the change: a zero output is persistence, so that training starts at a sane loss.
            tendency = self._tendency(window)
            last = window[:, -1].index_select(-1, self._prognostic)
            forecasts.append(last + tendency * self.constants.tendency_scale)
            # True forcings (sun, date) of the next state; its prognostic variables come from the forecast.
            if step + 1 < rollout:
                given = states[:, num_input + step]
                window = torch.cat((window[:, 1:], self._state(forecasts[-1], given).unsqueeze(1)), 1)
        return torch.stack(forecasts, 1)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of the tendency, weighted by area, in units of its own standard deviation.

        Parameters
        ----------
        prediction : torch.Tensor
            Result of :meth:`forecast`.
        batch : Batch
            The same batch, with the true states of all forecast steps.

        Returns
        -------
        torch.Tensor
            float32 scalar; about 1 for persistence over one step.
        """
        first = self.spec.multistep_input
        truth = self.normalise(batch.fields[:, first : first + prediction.shape[1]]).index_select(-1, self._prognostic)
        # float32 under any precision: bf16 would lose a small tendency in the difference of two states.
        error = (prediction.float() - truth) / self.constants.tendency_scale
        return (error.square() * self.constants.area_weight).mean()

    def normalise(self, fields: Tensor) -> Tensor:
        """Return (physical - mean) / stdev, float32, for shape (..., variable)."""
        return (fields.float() - self.constants.mean) / self.constants.stdev

    def denormalise(self, prediction: Tensor) -> Tensor:
        """Return physical units, float32, for normalised shape (..., prognostic variable)."""
        mean, stdev = self.constants.mean[self._prognostic], self.constants.stdev[self._prognostic]
        return prediction.float() * stdev + mean

    def _tendency(self, window: Tensor) -> Tensor:
        """Run the model in the precision that the engine chose; float32 in, float32 out."""
        # The model alone: normalisation and loss stay outside of autocast, in float32.
        if window.is_meta:  # shapes alone, for which there is no autocast
            autocast: AbstractContextManager[Any] = nullcontext()
        else:
            enabled = self.autocast_dtype is not None
            autocast = torch.autocast(window.device.type, dtype=self.autocast_dtype, enabled=enabled)
        with autocast:
            # A copy: a model that changes its input in place would change the states that its output is added to.
            output = self.model(window.to(self.compute_dtype, copy=True))
        self._check_output(output, window)
        return output.float()

    def _check_output(self, output: Any, window: Tensor) -> None:
        """Refuse what would be broadcast to the shape of a state, or is no tensor."""
        batch, _, ensemble, grid, _ = window.shape
        needed = (batch, ensemble, grid, len(self.spec.prognostic))
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if given != needed:
            raise ConfigError(
                "model._target_",
                self.config.model["_target_"],
                f"returns {given} for an input of shape {tuple(window.shape)}",
                fix=f"return a tensor of shape {needed}: (batch, ensemble, grid, prognostic variable)",
            )

    def _state(self, prognostic: Tensor, given: Tensor) -> Tensor:
        """Join a forecast and the true forcings of its date into one state (..., variable)."""
        return given.index_copy(-1, self._prognostic, prognostic)


def build_model(node: Tree, spec: DataSpec, allowed: Iterable[str] = ()) -> nn.Module:
    """Build the model that a configuration node names.

    Parameters
    ----------
    node : Tree
        ``_target_`` and the constructor's keyword arguments.
    spec : DataSpec
        Passed as ``data`` to a constructor that takes it.
    allowed : Iterable[str]
        Import prefixes that the user allows besides the built-in ones.

    Raises
    ------
    ConfigError
        The target is not allowed or no ``torch.nn.Module``, or an argument is unknown or missing.
    """
    target = node["_target_"]
    build, arguments = split_node(node, key="model", allowed=allowed, base=nn.Module)
    # A model may let Hydra build what is nested: nothing that the user has not named belongs there.
    for key, nested in nested_targets(arguments, key="model"):
        resolve_target(nested, key=key, allowed=allowed, built_in=())
    takes_data = "data" in inspect.signature(build).parameters
    if takes_data and "data" in arguments:
        raise ConfigError("model.data", arguments["data"], "is filled in from the dataset", fix="remove it")
    check_arguments(build, arguments, key="model", injected={"data": "the dataset"} if takes_data else {})
    if takes_data:
        arguments["data"] = spec
    model = build(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError("model._target_", target, f"must build a torch.nn.Module, not {type(model).__name__}")
    return model


def _constants(spec: DataSpec) -> Float32Constants:
    """Return the constants of forward pass and loss.

    ``area_weight`` is the cosine of latitude with mean 1, shape (grid, 1); ``tendency_scale`` turns a normalised
    tendency into a change of the normalised state, shape (prognostic variable,).
    """
    prognostic = spec.prognostic_indices
    stdev = _positive(spec, spec.stdev, range(len(spec.variables)), "stdev")
    tendency_stdev = _positive(spec, spec.tendency_stdev, prognostic, "tendency_stdev")
    # A pole row has no area; rounding must not give it a negative one.
    area = np.clip(np.cos(np.deg2rad(spec.latitudes)), 0.0, None)
    return Float32Constants(
        mean=spec.mean,
        stdev=stdev,
        tendency_scale=tendency_stdev[prognostic] / stdev[prognostic],
        area_weight=(area / area.mean())[:, None],
    )


def _positive(spec: DataSpec, values: np.ndarray, used: Iterable[int], name: str) -> np.ndarray:
    """Return ``values`` after checking that those at ``used`` are positive divisors."""
    for index in used:
        if not 0 < values[index] < np.inf:
            raise ConfigError(
                f"data: {name} of {spec.variables[index]}",
                float(values[index]),
                "must be positive and finite to normalise with",
                fix="leave a constant variable out (data.options.drop) or correct the dataset's statistics",
            )
    return values
