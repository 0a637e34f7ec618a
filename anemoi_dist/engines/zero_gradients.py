"""Flat gradient partitions of ZeRO 1 and 2: filled where the optimizer reads them, and squared as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from anemoi_dist.optimizers.norm import squared_norms, sum_of_squares


class GradientPartitions:
    """The averaged gradients of this rank's partitions, as DeepSpeed hands them over one parameter at a time.

    The buffers live as long as the engine: fresh memory for every step would cost a CPU more than the step.

    Parameters
    ----------
    slices : Sequence[torch.Tensor]
        For each parameter's part in the partitions, in order: its view of the flat gradient, zero.
    is_last : Callable[[], bool]
        Whether the gradients that arrive are those of the step's last micro-batch.
    eager : bool
        Take the squared norm of each slice when its gradient is complete, while the backward pass continues.
    """

    def __init__(self, slices: Sequence[torch.Tensor], *, is_last: Callable[[], bool], eager: bool) -> None:
        self._slices, self._is_last, self._eager = slices, is_last, eager
        self._index = {part.data_ptr(): index for index, part in enumerate(slices)}
        self._arrived: set[int] = set()
        self._stale: set[int] = set()
        self._squares: dict[int, torch.Tensor] = {}

    def receive(self, place: torch.Tensor | None, gradient: torch.Tensor) -> None:
        """Write an averaged gradient to its slice, or add it to those of earlier micro-batches.

        Parameters
        ----------
        place : torch.Tensor | None
            One of the slices; None if the gradient belongs to another rank.
        gradient : torch.Tensor
            Any shape with as many elements.
        """
        if place is None:
            return
        index = self._index[place.data_ptr()]
        # The first gradient of a step overwrites the last step's: zeroing the buffer would be one more pass over it.
        if index in self._arrived:
            place.add_(gradient.view(-1).to(place.dtype))
        else:
            place.copy_(gradient.view(-1))
            self._arrived.add(index)
        if self._eager and self._is_last():
            self._squares[index] = squared_norms([self._slices[index]])

    def sum_of_squares(self) -> torch.Tensor | None:
        """Return the sum of all squares on this rank, None without a gradient; unused slices are zero from here on."""
        # A parameter that this step did not use still shows the gradient of the last one that did.
        for index in self._stale - self._arrived:
            self._slices[index].zero_()
        self._stale = set(self._arrived)
        # In the order of the partition, not of arrival: a sum in another order has other bits, and arrival may differ
        # from run to run.
        arrived = {index: self._slices[index] for index in sorted(self._arrived)}
        return sum_of_squares(arrived, self._squares) if arrived else None

    def begin(self) -> None:
        """Expect the gradients of the next step."""
        self._arrived.clear()
        self._squares.clear()
