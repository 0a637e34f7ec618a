"""The squared norm of gradients in one read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from anemoi_dist.optimizers import native

_Key = TypeVar("_Key")

#: Elements of which one norm is taken. A sum in float32 over much more loses digits: 0.4 % of the norm at 50 million.
_CHUNK_NUMEL = 1 << 20


def squared_norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of each gradient's elements, in one read of them.

    Parameters
    ----------
    gradients : Sequence[torch.Tensor]
        Any shapes and floating types, at least one; all on one device.

    Returns
    -------
    torch.Tensor
        1-D float64, on their device: a number for each, which does not depend on the others.
    """
    # Each tensor goes the same way whatever the others are: its square must not depend on what it is batched with, or
    # the norm would have other bits with `engine.overlap`, which squares tensors one by one.
    in_c = [index for index, gradient in enumerate(gradients) if native.can_square(gradient)]
    if len(in_c) == len(gradients):
        return native.squared_norms(gradients)
    if not in_c:
        return _by_torch(gradients)
    squares = torch.empty(len(gradients), dtype=torch.float64)
    others = [index for index in range(len(gradients)) if index not in set(in_c)]
    squares[in_c] = native.squared_norms([gradients[index] for index in in_c])
    squares[others] = _by_torch([gradients[index] for index in others])
    return squares


def sum_of_squares(gradients: Mapping[_Key, torch.Tensor], known: Mapping[_Key, torch.Tensor]) -> torch.Tensor:
    """Return the sum of all squares, some of which are known already.

    Parameters
    ----------
    gradients : Mapping[_Key, torch.Tensor]
        At least one. Summed in this order, however each number came about: the same bits.
    known : Mapping[_Key, torch.Tensor]
        Results of :func:`squared_norms` for some of them alone.

    Returns
    -------
    torch.Tensor
        0-d float64.
    """
    late = [key for key in gradients if key not in known]
    found = dict(known)
    if late:
        found |= zip(late, squared_norms([gradients[key] for key in late]).split(1), strict=True)
    return torch.cat([found[key] for key in gradients]).sum()


def _by_torch(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    chunks = [gradient.reshape(-1).split(_CHUNK_NUMEL) for gradient in gradients]
    squares = _norms([chunk for parts in chunks for chunk in parts]).square()
    if len(squares) == len(gradients):
        return squares
    lengths = torch.tensor([len(parts) for parts in chunks], device=squares.device)
    return torch.segment_reduce(squares, "sum", lengths=lengths, unsafe=True)  # safe: a GPU would be waited for


def _norms(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norms, taken in float32 at least: that of a bf16 tensor would be rounded to bf16."""
    norms = torch.empty(len(chunks), dtype=torch.float64, device=chunks[0].device)
    for dtype in dict.fromkeys(chunk.dtype for chunk in chunks):
        indices = [index for index, chunk in enumerate(chunks) if chunk.dtype == dtype]
        alike = [chunks[index] for index in indices]
        taken = torch.stack(torch._foreach_norm(alike, 2, dtype=torch.promote_types(dtype, torch.float32)))
        if len(alike) == len(chunks):
            return taken.double()
        norms[indices] = taken.double()
    return norms
