"""The seam between what is trained and what trains it.

A task knows its data, model, loss, optimizer, scores and files. Engines, trainer and checkpoints know none of these:
they move parameters, gradients and states of a :class:`TaskModule`, and pass batches through it without looking inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from anemoi_dist.distributed.world import World


class Batch(Protocol):
    """One micro-batch: only the task looks inside."""

    def to(self, device: torch.device) -> Self:
        """Copy to ``device``, without waiting where the batch is pinned."""


class Samples(Protocol):
    """The samples of one split by index, the same on every rank."""

    def __len__(self) -> int:
        """Count the samples."""

    def __getitem__(self, index: int) -> Any:
        """Read one sample."""


class TaskModule(nn.Module, ABC):
    """Model and loss in one module, so that engines can wrap both at once.

    Attributes
    ----------
    compute_dtype : torch.dtype
        Type of the model's input. An engine that casts the model's weights sets this too.
    autocast_dtype : torch.dtype or None
        Type that the model computes in under autocast. For an engine that keeps float32 weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype = torch.float32
        self.autocast_dtype: torch.dtype | None = None

    @abstractmethod
    def forward(self, batch: Any, **evaluation: Any) -> Tensor:
        """Return the loss of a batch, a float32 scalar; with ``evaluation``, whatever the task's scores ask for."""

    @abstractmethod
    def configure_optimizers(self) -> dict[str, Any]:
        """Build optimizer and scheduler, in the form that Lightning expects.

        Returns
        -------
        dict[str, Any]
            ``optimizer``, and ``lr_scheduler`` with ``scheduler`` and ``interval: step``, absent for a constant rate.
        """


#: ``evaluate(batch, **evaluation)`` calls the module's ``forward`` without gradient, in evaluation mode. Collective.
Evaluate = Callable[..., Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes
    ----------
    scores : Sequence[Mapping[str, object]]
        One record a score, as it stands in a ``validation`` event.
    table : str
        The same for a reader.
    metrics : Mapping[str, float]
        The scores by name, for TensorBoard.
    summary : Mapping[str, float]
        One number for each metric that ``checkpoint.keep_best`` can name.
    """

    scores: Sequence[Mapping[str, object]] = ()
    table: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """What is trained."""

    def samples(self, split: str) -> Samples:
        """Return the samples of ``train``, ``validation`` or ``test``."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Join samples into one :class:`Batch`; called in the data workers."""

    def warnings(self) -> list[str]:
        """Return what the user should know of data and settings before the first step."""

    def create_module(self, *, world_size: int) -> TaskModule:
        """Build model and loss, the same on every rank that was seeded alike.

        Parameters
        ----------
        world_size : int
            Data-parallel ranks, for ``training.lr.scale_with``.
        """

    def evaluate(self, split: str, *, evaluate: Evaluate, world: World) -> Evaluation:
        """Score the model on a split. Collective."""

    def export(self, directory: Path, *, evaluate: Evaluate, world: World) -> None:
        """Write what the report shows of a trained model into ``directory``. Collective; rank 0 writes."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be remembered beside tensors, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
