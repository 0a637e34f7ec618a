"""The interface between the trainer and the code that moves parameters, gradients and states between ranks.

Nothing outside ``engines/`` knows DeepSpeed or FSDP2; every engine passes the one conformance suite in
``tests/engines``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from anemoi_dist.checkpoint.shard import Shard, ShardSource
from anemoi_dist.tasks.base import Batch


@dataclass(frozen=True)
class StepReport:
    """Result of one optimizer step. Every value is global: the same on all ranks.

    Attributes
    ----------
    loss : float
        Mean over the global batch.
    grad_norm : float
        L2 norm of the global gradient before clipping.
    lr : float
        Learning rate of the first parameter group in this update.
    skipped : bool
        The loss or the gradient was not finite on some rank; no parameter and no state was touched.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that this rank holds.

    Attributes
    ----------
    parameters : int
        Working parameters (bf16 or fp32), as they lie between two steps.
    master : int
        fp32 masters, where they are another tensor than the working parameters.
    states : Mapping[str, int]
        Bytes of each optimizer state, by its name (``exp_avg_fast``, ...), and of the average of the weights
        (``weight_average``), padding included.
    """

    parameters: int
    master: int
    states: Mapping[str, int]


class Engine(Protocol):
    """One rank's share of the training state and the collective operations on it."""

    def train_step(self, micro_batches: Sequence[Batch]) -> StepReport:
        """Do one optimizer step on this rank's micro-batches, then advance the learning rate. Collective."""

    def evaluate(self, batch: Batch, **evaluation: Any) -> torch.Tensor:
        """Call the module without gradient, in evaluation mode. Collective: every rank calls it equally often.

        Parameters
        ----------
        batch : Batch
            On this rank's device.
        **evaluation : Any
            What the task asks of its module's ``forward``.
        """

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Let :meth:`evaluate` compute with the averaged weights inside of ``with``, if they are kept. Collective."""

    def shards(self) -> Iterator[Shard]:
        """Yield the shards that this rank has to save; over all ranks each element comes once."""

    def load(self, source: ShardSource, *, num_updates: int) -> None:
        """Load parameters, states and buffers from ``source`` and set the rate for update ``num_updates``."""

    def memory(self) -> MemoryReport:
        """Count the bytes that this rank holds."""

    def num_parameters(self) -> int:
        """Count the elements of all parameters, over all ranks and frozen ones included."""

    def schedule_values(self) -> dict[str, float]:
        """Return step-dependent values of the optimizer worth showing, such as ``alpha`` and ``beta3``."""

    def close(self) -> None:
        """Release what the engine started."""
