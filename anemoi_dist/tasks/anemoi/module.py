"""Model and loss of anemoi-training as one module that the engines can wrap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from anemoi_dist.config.schema import Config
from anemoi_dist.tasks.anemoi.groups import undivided_parameters
from anemoi_dist.tasks.anemoi.samples import AnemoiBatch
from anemoi_dist.tasks.base import KeepsBufferTypes, TaskModule

#: Names of parameters in our checkpoints begin with it: what follows is anemoi-training's name.
PREFIX = "method."


class AnemoiModule(KeepsBufferTypes, TaskModule):
    """A training method of anemoi-training (a LightningModule) without Lightning's trainer.

    Parameters
    ----------
    method : anemoi.training.train.methods.base.BaseTrainingModule
        Model, pre- and post-processors, losses, scalers and metrics.
    config : Config
        The run's configuration.
    world_size : int
        Data-parallel ranks, or groups of ranks that share a sample.

    Attributes
    ----------
    score_names : list[str]
        Names of what ``forward(batch, validation=True)`` returned last.
    """

    #: Its ranks may share the model, and then it communicates.
    rehearses = False

    def __init__(self, method: Any, config: Config, *, world_size: int) -> None:
        super().__init__(config, world_size=world_size)
        self.method = method
        self.score_names: list[str] = []
        #: Ranks that share the model.
        self._shared_by = config.task.groups.model
        if self._shared_by > 1:
            # Engines take the mean over all ranks, where the parts of a group's gradient have to be added: the loss is
            # multiplied, and what must not be is divided again.
            self.gradient_factors = dict.fromkeys(undivided_parameters(self), 1 / self._shared_by)

    def forward(self, batch: AnemoiBatch, *, validation: bool = False) -> Tensor:  # type: ignore[override]
        """Return the loss of a batch; with ``validation``, the loss and all metrics.

        Parameters
        ----------
        batch : AnemoiBatch
            Physical units; normalised in place.
        validation : bool
            Use the validation rollout, and compute the metrics.

        Returns
        -------
        torch.Tensor
            float32: a scalar, or shape (1 + metrics,), named by ``score_names``.
        """
        device = next(iter(batch.fields.values())).device
        # Statistics and inputs keep float32: bf16 would round a pressure to a multiple of 512 Pa.
        fields = self.method.on_after_batch_transfer(dict(batch.fields), 0)
        dtype = self.autocast_dtype or self.compute_dtype
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = self.method._step(fields, validation_mode=validation)
        loss = output.loss.reshape(()).float()
        if not validation:
            if self._shared_by > 1:
                loss.register_hook(partial(torch.mul, other=self._shared_by))
            return loss
        self.score_names = ["loss", *output.metrics]
        return torch.stack([loss, *(value.reshape(()).float() for value in output.metrics.values())])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.method._device = next(self.parameters()).device  # Lightning's own idea of where it is
        return self
