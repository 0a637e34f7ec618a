"""Samples of anemoi-training's datasets by index, with the window that the task needs at a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anemoi_dist.tasks.anemoi.curriculum import Curriculum


class AnemoiBatch(NamedTuple):
    """One micro-batch, or one sample.

    Attributes
    ----------
    fields : dict[str, torch.Tensor]
        Dataset name -> float32 in physical units, shape (batch, time, ensemble, grid, variable); a sample has no
        batch axis.
    """

    fields: dict[str, Tensor]

    def to(self, device: torch.device) -> AnemoiBatch:
        """Copy to ``device``; asynchronously if the batch is pinned."""
        return AnemoiBatch({name: tensor.to(device, non_blocking=True) for name, tensor in self.fields.items()})


class AnemoiSamples:
    """The samples of one split, the same whatever the rollout.

    Parameters
    ----------
    dataset : anemoi.training.data.multidataset.MultiDataset
        The split.
    curriculum : Curriculum
        Says which dates around a sample are needed at a step; advanced by reading.
    mode : str
        Anemoi-training's name of the split: ``training``, ``validation`` or ``test``.
    """

    def __init__(self, dataset: Any, *, curriculum: Curriculum, mode: str) -> None:
        self._dataset, self._curriculum, self._mode = dataset, curriculum, mode
        # Anchors of the longest window: the order of the samples must not change when the rollout grows.
        dataset.set_epoch(0, relative_date_indices=self._indices(curriculum.longest()))

    def __len__(self) -> int:
        return len(self._dataset.anchors)

    def read(self, index: int, *, step: int) -> AnemoiBatch:
        """Read one sample, with the dates that the task needs at optimizer step ``step``."""
        from anemoi.training.utils.time_indices import normalize_time_indices

        self._curriculum.advance(step)
        indices = self._indices(self._curriculum.task)
        self._dataset.relative_date_indices = {name: normalize_time_indices(i) for name, i in indices.items()}
        return AnemoiBatch(self._dataset.get_sample(index))

    def _indices(self, task: Any) -> dict[str, list[int]]:
        from anemoi.training.data.relative_time_indices import compute_relative_date_indices

        return compute_relative_date_indices(task, self._dataset.data_readers, mode=self._mode)


def collate(samples: Sequence[AnemoiBatch]) -> AnemoiBatch:
    """Stack samples along a new first axis."""
    return AnemoiBatch({name: torch.stack([s.fields[name] for s in samples]) for name in samples[0].fields})
