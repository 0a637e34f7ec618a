"""AdEMAMix's update through ``torch.compile``, for machines with a compiler and without the kernel in C.

Each tensor is compiled as a flat one of any size, and the step's numbers come as one tensor: there is one graph for all
tensors and all steps. The first update compiles (some 15 s of CPU), later processes find it in torch's cache. Generated
code may round a multiplication and an addition once or twice: results differ from
:func:`~anemoi_dist.optimizers.update.ademamix_update` by units in the last place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from anemoi_dist.optimizers.update import Row, UpdateScalars, ademamix_update


@functools.cache
def has_compiler() -> bool:
    """Whether torch finds what it needs to generate code for a CPU."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # whatever is missing, torch's answer is that it can't
        return False
    return True


def refusal(row: Row) -> str:
    """Say why this implementation can't update a row; empty where it can."""
    if row.p.is_cpu and not has_compiler():
        return "needs a C++ compiler (torch.compile), and there is none"
    if row.is_rounded:
        return "has no stochastic rounding for states in bfloat16"
    if not all(x is None or x.is_contiguous() for x in row):
        return "takes contiguous parameters, gradients and states"
    return ""


def update(rows: list[Row], scalars: UpdateScalars) -> None:
    """Update rows that :func:`refusal` accepts, all with the same numbers."""
    device, dtype = rows[0].p.device, rows[0].nu.dtype
    factor = scalars.grad_factor
    numbers = torch.tensor([*scalars[:-1], 1.0], dtype=dtype).to(device, non_blocking=True)
    numbers[-1:] *= factor  # which may be a tensor on the device: it stays there
    for p, g, m1, m2, nu, copy, _ in rows:
        _compiled()(
            p.detach().view(-1), g.view(-1), None if m1 is None else m1.view(-1), m2.view(-1), nu.view(-1), numbers
        )
        if copy is not None:
            copy.copy_(p)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_flat_update, dynamic=True, fullgraph=True)


def _flat_update(p: Tensor, g: Tensor, m1: Tensor | None, m2: Tensor, nu: Tensor, numbers: Tensor) -> None:
    ademamix_update(p, g, m1, m2, nu, UpdateScalars(*numbers.unbind()))
