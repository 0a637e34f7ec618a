"""The CPU kernels in C (``_ademamix.c``): AdEMAMix's update and the norm of gradients, in one pass over all tensors.

The package's build compiles it where there is a compiler (``setup.py``); it needs neither torch's nor Python's headers
and is called through ctypes, which leaves the interpreter's lock free meanwhile.

The result is :func:`~anemoi_dist.optimizers.update.ademamix_update`'s bit for bit on processors with fused
multiply-add (x86-64 since 2013, arm64), with two exceptions. The square root is rounded correctly, where the library
that torch calls on x86 may be off by one unit in the last place: that reaches the parameter, not the EMA states. And
denormal numbers are flushed to zero: an EMA state that decays towards zero stays denormal for ever and costs ten times
as much.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anemoi_dist.optimizers.update import ParamTensors, UpdateScalars

#: Elements that the library takes at once, as ``_ademamix.c`` says too.
CHUNK = 16384

#: ``ademamix_version()`` of the library that this file knows how to call.
VERSION = 3

_BF16 = torch.bfloat16
_DTYPES = {torch.float32, _BF16}


@functools.cache
def library() -> Any:
    """Return the compiled functions, or None where the package was installed without them."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_ademamix{suffix}")
        if path.exists():
            try:
                loaded = ctypes.CDLL(str(path))
                if loaded.ademamix_version() != VERSION:
                    continue
            # Whatever is wrong with it, training continues without the kernel, more slowly.
            except (OSError, AttributeError):  # built for another machine or long ago; the OpenMP runtime is missing
                continue
            pointer = ctypes.c_void_p
            loaded.ademamix_step.restype = None
            loaded.ademamix_step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int]
            loaded.ademamix_squares.restype = None
            loaded.ademamix_squares.argtypes = [pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int]
            return loaded
    return None


def refusal(param: ParamTensors) -> str:
    """Return why this implementation can't update a parameter; empty if it can."""
    p, g, m1, m2, nu, copy, _ = param
    numel = p.numel()
    for x in (p, g, m1, m2, nu):  # asked of each parameter in each step
        if x is not None and not (x.dtype in _DTYPES and x.is_cpu and x.is_contiguous() and x.numel() == numel):
            return _reason(param)
    is_plain = copy is None and not g.is_neg() and library() is not None
    return "" if is_plain else _reason(param)


def _reason(param: ParamTensors) -> str:
    p, g, *_, copy, _ = param
    tensors = (p, g, *param.ema_states)
    if library() is None:
        return "needs the compiled kernel, and the package was built without a compiler"
    if not (p.is_cpu and g.is_cpu):
        return f"works on the CPU, and the parameter is on {p.device}"
    if any(x.dtype not in _DTYPES for x in tensors):
        return f"takes float32 and bfloat16, not a parameter of {p.dtype} with a gradient of {g.dtype}"
    if copy is not None and (copy.dtype != torch.bfloat16 or not copy.is_contiguous()):
        return f"writes contiguous copies in bfloat16, not {copy.dtype}"
    if not all(x.is_contiguous() for x in tensors) or g.is_neg():
        return "takes contiguous parameters, gradients and states"
    if any(x is not None and x.numel() != p.numel() for x in (*tensors, copy)):
        return "takes gradients, states and copies of the parameter's shape"
    return ""


def update(params: list[ParamTensors], scalars: UpdateScalars) -> None:
    """Update parameters that :func:`refusal` accepts, all with the same numbers."""
    table = array("q")
    for p, g, m1, m2, nu, copy, element_ranges in params:
        types = (g.dtype is _BF16) | (p.dtype is _BF16) << 1 | (m2.dtype is _BF16) << 3 | (nu.dtype is _BF16) << 4
        fast = written = ranges = num_ranges = 0
        if m1 is not None:
            fast, types = m1.data_ptr(), types | (m1.dtype is _BF16) << 2
        if copy is not None:
            written = copy.data_ptr()
        if element_ranges is not None:
            ranges, num_ranges = element_ranges.data_ptr(), len(element_ranges)
        parameter, gradient, slow, square = p.data_ptr(), g.data_ptr(), m2.data_ptr(), nu.data_ptr()
        table.extend((parameter, gradient, fast, slow, square, written, p.numel(), types, ranges, num_ranges))
    factor = scalars.grad_factor
    pointer = None
    if isinstance(factor, Tensor):
        factor = factor.detach().to(device="cpu", dtype=torch.float32)
        pointer = factor.data_ptr()
    numbers = array("f", (*map(float, scalars[:-1]), 1.0 if pointer else float(factor)))
    step = library().ademamix_step
    step(table.buffer_info()[0], len(params), numbers.buffer_info()[0], pointer, torch.get_num_threads())


def can_square(tensor: Tensor) -> bool:
    """Whether :func:`squared_norms` takes a tensor, made contiguous."""
    return tensor.is_cpu and tensor.dtype in _DTYPES and library() is not None


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of each: the same bits on every machine and for any number of threads."""
    tensors = [x.contiguous() for x in tensors]
    table = array("q")
    for x in tensors:
        table.extend((0, x.data_ptr(), 0, 0, 0, 0, x.numel(), int(x.dtype is _BF16), 0, 0))
    partial = array("d", bytes(8 * sum(-(-x.numel() // CHUNK) for x in tensors)))
    sums = torch.empty(len(tensors), dtype=torch.float64)
    squares = library().ademamix_squares
    squares(table.buffer_info()[0], len(tensors), partial.buffer_info()[0], sums.data_ptr(), torch.get_num_threads())
    return sums
