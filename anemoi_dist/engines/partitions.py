"""Flat gradient partitions of ZeRO 1 and 2: gradients put where the optimizer reads them, and their squared norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Elements whose norm is taken at once. A sum in float32 over much more loses digits: 0.4 % of the norm at 50 million.
_PIECE = 1 << 20


def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements in one read of them.

    Parameters
    ----------
    gradients : Sequence[torch.Tensor]
        Any shapes and floating types, at least one; all on one device.

    Returns
    -------
    torch.Tensor
        0-d float64. The order of the sum is a function of the shapes alone.
    """
    pieces = [piece for gradient in gradients for piece in gradient.reshape(-1).split(_PIECE)]
    return torch.stack(_norms(pieces)).double().square().sum()


def _norms(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the L2 norms in float32: that of a bf16 tensor would be rounded to bf16."""
    wide = [piece for piece in pieces if piece.dtype == torch.float32]
    narrow = [piece for piece in pieces if piece.dtype != torch.float32]
    norms = list(torch._foreach_norm(wide)) if wide else []
    if narrow and not narrow[0].is_cpu:
        norms += torch._foreach_norm(narrow, 2, dtype=torch.float32)
    elif narrow:  # torch converts bf16 an element at a time there; a piece of it, converted, stays in the cache
        scratch = torch.empty(max(piece.numel() for piece in narrow))
        norms += [torch.linalg.vector_norm(scratch[: piece.numel()].copy_(piece)) for piece in narrow]
    return norms


class GradientPartitions:
    """The averaged gradients of this rank's partitions, as DeepSpeed hands them over one parameter at a time.

    The buffers live as long as the engine: fresh memory for every step would cost a CPU more than the step.

    Parameters
    ----------
    pieces : Sequence[torch.Tensor]
        For each parameter's part in the partitions, in order: its view of the flat gradient, zero.
    is_last : Callable[[], bool]
        Whether the gradients that arrive are those of the last micro-batch.
    eager : bool
        Square the norm of each piece when it is complete, and not all of them at the step.
    """

    def __init__(self, pieces: Sequence[torch.Tensor], *, is_last: Callable[[], bool], eager: bool) -> None:
        self._pieces, self._is_last, self._eager = pieces, is_last, eager
        self._index = {piece.data_ptr(): index for index, piece in enumerate(pieces)}
        self._arrived: set[int] = set()
        self._stale: set[int] = set()
        self._squares: dict[int, torch.Tensor] = {}

    def receive(self, place: torch.Tensor | None, gradient: torch.Tensor) -> None:
        """Put an averaged gradient into its place, or add it to those of earlier micro-batches.

        Parameters
        ----------
        place : torch.Tensor | None
            One of the pieces; None where the gradient belongs to another rank.
        gradient : torch.Tensor
            As many elements.
        """
        if place is None:
            return
        index = self._index[place.data_ptr()]
        if index in self._arrived:
            place.add_(gradient.view(-1).to(place.dtype))
        else:
            place.copy_(gradient.view(-1))
            self._arrived.add(index)
        if self._eager and self._is_last():
            self._squares[index] = sum_of_squares([self._pieces[index]])

    def sum_of_squares(self) -> torch.Tensor | None:
        """Return the sum of all squares on this rank, None without a gradient; what got none is zero from here on."""
        for index in self._stale - self._arrived:
            self._pieces[index].zero_()
        self._stale = set(self._arrived)
        # Piece by piece whether they were squared on arrival or not: the same sum, bit for bit.
        squares = [
            self._squares[index] if index in self._squares else sum_of_squares([self._pieces[index]])
            for index in sorted(self._arrived)
        ]
        return torch.stack(squares).sum() if squares else None

    def begin(self) -> None:
        """Expect the gradients of the next step."""
        self._arrived.clear()
        self._squares.clear()
