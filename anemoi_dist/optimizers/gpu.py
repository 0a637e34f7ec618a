"""AdEMAMix's update on CUDA in Triton: one read and one write of memory, one launch a tensor.

The step scalars come from a float32 tensor on the device in the order of
:class:`~anemoi_dist.optimizers.update.UpdateScalars`: nothing is read back by the host, and a captured graph replays
with the scalars of its own step. Offsets are 64-bit: a flat partition may hold more than 2^31 elements.

Each line rounds as :func:`~anemoi_dist.optimizers.update.ademamix_update` does. Triton's interpreter, in which the
tests run on a CPU, has no fused multiply-add and no rounding to bfloat16 but cutting: there results differ by units in
the last place.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from anemoi_dist.optimizers.update import ParamTensors, UpdateScalars

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Elements that one program updates.
BLOCK = 1024


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def refusal(param: ParamTensors) -> str:
    """Return why this implementation can't update a parameter; empty if it can."""
    p, g, *_, copy, _ = param
    if not has_triton():
        return "needs the package triton, which is not installed"
    if not (p.is_cuda and g.is_cuda) and not _interpreted():
        return f"works on CUDA, and the parameter is on {p.device}"
    if p.dtype not in _DTYPES or g.dtype not in _DTYPES or param.nu.dtype == torch.float64:
        return f"takes float32, bfloat16 and float16, not a parameter of {p.dtype} with a gradient of {g.dtype}"
    if copy is not None and copy.dtype not in _DTYPES:
        return f"writes copies in float32, bfloat16 and float16, not {copy.dtype}"
    if not all(x is None or x.is_contiguous() for x in param) or g.is_neg():
        return "takes contiguous parameters, gradients and states"
    if any(x is not None and x.numel() != p.numel() for x in param[:6]):
        return "takes gradients, states and copies of the parameter's shape"
    return ""


def update(params: list[ParamTensors], scalars: UpdateScalars) -> None:
    """Update parameters that :func:`refusal` accepts, all with the same numbers, from the host."""
    numbers = torch.tensor([*scalars[:-1], 1.0], dtype=torch.float32).to(params[0].p.device, non_blocking=True)
    numbers[-1:] *= scalars.grad_factor  # which may be a tensor on the device: it stays there
    for param in params:
        launch(param, numbers)


def launch(param: ParamTensors, numbers: Tensor) -> None:
    """Update one parameter with the step scalars in ``numbers``, without reading anything back to the host."""
    p, g, m1, m2, nu, copy, element_ranges = param
    numel = p.numel()
    if numel == 0:
        return
    kernel: Any = _kernels().ademamix_kernel
    # A null pointer can't be typed: what is absent is stood for by what is there, and not touched.
    kernel[(-(-numel // BLOCK),)](
        p,
        g,
        m2 if m1 is None else m1,
        m2,
        nu,
        p if copy is None else copy,
        numbers,
        numbers if element_ranges is None else element_ranges,
        numel,
        0 if element_ranges is None else len(element_ranges),
        has_fast=m1 is not None,
        has_copy=copy is not None,
        is_rounded=param.is_rounded,
        block=BLOCK,
        enable_fp_fusion=False,
    )


@functools.cache
def _kernels() -> Any:
    from anemoi_dist.optimizers import _triton

    return _triton


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
