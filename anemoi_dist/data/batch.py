"""Interface between data and model: one batch, and a description of its variables and grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """Consecutive states of the atmosphere in physical units.

    Attributes
    ----------
    fields : torch.Tensor
        float32, shape (batch, multistep_input + rollout, ensemble, grid, variable), oldest state first.
    dates : torch.Tensor
        int64, shape (batch,): valid time of the last input state, in seconds since 1970-01-01 UTC.
    """

    fields: torch.Tensor
    dates: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``; asynchronously if the batch is pinned."""
        return Batch(self.fields.to(device, non_blocking=True), self.dates.to(device, non_blocking=True))


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack samples along a new first axis."""
    return Batch(torch.stack([s.fields for s in samples]), torch.stack([s.dates for s in samples]))


@dataclass(frozen=True)
class DataSpec:
    """Description of a dataset for model and loss.

    Attributes
    ----------
    variables : tuple[str, ...]
        Names along the last axis of ``Batch.fields``.
    forcing : tuple[str, ...]
        Variables that are given and not forecast; all others are prognostic.
    latitudes, longitudes : np.ndarray
        float64, shape (grid,), degrees.
    field_shape : tuple[int, ...]
        (latitude, longitude) of a regular grid, (grid,) of any other.
    mean, stdev : np.ndarray
        float64, shape (variable,): statistics stored with the dataset.
    tendency_stdev : np.ndarray
        float64, shape (variable,): standard deviation of the change over one forecast step.
    multistep_input : int
        Input states of the model.
    frequency_s : int
        Seconds between two states.
    """

    variables: tuple[str, ...]
    forcing: tuple[str, ...]
    latitudes: np.ndarray
    longitudes: np.ndarray
    field_shape: tuple[int, ...]
    mean: np.ndarray
    stdev: np.ndarray
    tendency_stdev: np.ndarray
    multistep_input: int
    frequency_s: int

    @property
    def prognostic(self) -> tuple[str, ...]:
        """Variables that the model forecasts, in dataset order."""
        return tuple(name for name in self.variables if name not in self.forcing)

    @property
    def prognostic_indices(self) -> list[int]:
        """Positions of the prognostic variables along the variable axis."""
        return [i for i, name in enumerate(self.variables) if name not in self.forcing]
