"""AdEMAMix's update on a CPU in C (``_ademamix.c``): one read and one write of memory, for a whole list of tensors.

The package's build compiles it where there is a compiler (``setup.py``); it needs neither torch's nor Python's headers
and is called through ctypes, which leaves the interpreter's lock free meanwhile.

The result is :func:`~anemoi_dist.optimizers.update.ademamix_update`'s bit for bit on processors with fused
multiply-add (x86-64 since 2013, arm64), with two exceptions. The square root is rounded correctly, where the library
that torch calls on x86 may be off by one unit in the last place: that reaches the parameter, not the averages. And
denormal numbers are flushed to zero: an average that decays towards zero stays denormal for ever and costs ten times
as much.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anemoi_dist.optimizers.update import Row, UpdateScalars

#: ``ademamix_version()`` of the library that this file knows how to call.
VERSION = 1

_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def library() -> Any:
    """Return the compiled function, or None where the package was installed without one."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_ademamix{suffix}")
        if path.exists():
            try:
                loaded = ctypes.CDLL(str(path))
                if loaded.ademamix_version() != VERSION:
                    continue
            except (OSError, AttributeError):  # built for another machine or long ago; the OpenMP runtime is missing
                continue
            function = loaded.ademamix_step
            function.restype = None
            pointer = ctypes.c_void_p
            function.argtypes = [pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int]
            return function
    return None


def refusal(row: Row) -> str:
    """Say why this implementation can't update a row; empty where it can."""
    p, g, m1, m2, nu, copy = row
    if library() is None:
        return "needs the compiled kernel, and the package was built without a compiler"
    if not (p.is_cpu and g.is_cpu):
        return f"works on the CPU, and the parameter is on {p.device}"
    if p.dtype not in _DTYPES or g.dtype not in _DTYPES or nu.dtype != torch.float32:
        return f"takes float32 and bfloat16, not a parameter of {p.dtype} with a gradient of {g.dtype}"
    if copy is not None and (copy.dtype != torch.bfloat16 or not copy.is_contiguous()):
        return f"writes contiguous copies in bfloat16, not {copy.dtype}"
    contiguous = p.is_contiguous() and g.is_contiguous() and m2.is_contiguous() and nu.is_contiguous()
    if not contiguous or (m1 is not None and not m1.is_contiguous()):
        return "takes contiguous parameters, gradients and states"
    return ""


def update(rows: list[Row], scalars: UpdateScalars) -> None:
    """Update rows that :func:`refusal` accepts, all with the same numbers."""
    table = array("q")
    for p, g, m1, m2, nu, copy in rows:
        types = (g.dtype is torch.bfloat16) | (p.dtype is torch.bfloat16) << 1
        fast = 0 if m1 is None else m1.data_ptr()
        narrow = 0 if copy is None else copy.data_ptr()
        table.extend(
            (p.data_ptr(), g.data_ptr(), fast, m2.data_ptr(), nu.data_ptr(), narrow, p.numel(), types),
        )
    factor = scalars.grad_factor
    pointer = None
    if isinstance(factor, Tensor):
        factor = factor.detach().to(device="cpu", dtype=torch.float32)
        pointer = factor.data_ptr()
    numbers = array("f", (*map(float, scalars[:-1]), 1.0 if pointer else float(factor)))
    library()(table.buffer_info()[0], len(rows), numbers.buffer_info()[0], pointer, torch.get_num_threads())
