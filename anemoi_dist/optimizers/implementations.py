"""The implementations of AdEMAMix's update: one is selected for each tensor, or named by the user.

============ ===================================================================== =================================
Name         What it is                                                            Chosen by ``auto``
============ ===================================================================== =================================
``c``        :mod:`~anemoi_dist.optimizers.native`: one pass, all tensors at once  on a CPU
``triton``   :mod:`~anemoi_dist.optimizers.gpu`: one pass, one launch a tensor     on CUDA: large tensors; in a graph
``foreach``  torch's grouped operations                                            on CUDA and XPU: lists of small
                                                                                   tensors
``eager``    :func:`~anemoi_dist.optimizers.update.ademamix_update`                everything else
============ ===================================================================== =================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import gpu, native, update
from anemoi_dist.optimizers.update import ParamGroup, ParamTensors, UpdateScalars

NAMES = ("auto", "c", "triton", "foreach", "eager")

#: From this many elements on a tensor is worth a kernel of its own: at a GPU's bandwidth its update takes longer than
#: the launch.
LARGE = 1 << 20

_PLAIN = (Tensor, torch.nn.Parameter)


def check_name(group: Mapping[str, Any]) -> None:
    """Refuse an implementation that is none, that can't be had here, or that contradicts another option."""
    name, foreach = group["implementation"], group["foreach"]
    if name not in NAMES:
        raise ConfigError("implementation", name, "is not a valid name", valid=NAMES)
    if foreach is not None and name not in ("auto", "foreach" if foreach else "eager"):
        raise ConfigError("implementation", name, f"contradicts foreach={foreach}", fix="foreach=None")
    if group["capturable"] and name in ("c", "foreach"):
        rule = "takes the step scalars from the host, and capturable=True keeps them on the device"
        raise ConfigError("implementation", name, rule, fix="implementation='auto', 'triton' or 'eager'")
    missing = ""
    if name == "c" and native.library() is None:
        missing = "needs the compiled kernel, and the package was built without a compiler"
    if name == "triton" and not gpu.has_triton():
        missing = "needs the package triton, which is not installed"
    if missing:
        raise ConfigError("implementation", name, missing, fix="implementation='auto'")


def select(param: ParamTensors, group: ParamGroup) -> str:
    """Return the implementation that updates a parameter whose tensors are local.

    Raises
    ------
    ConfigError
        The one that the group names can't, or none can.
    """
    name = group["implementation"]
    if isinstance(param.p, DTensor) and name in _REFUSALS:  # local_tensors left it as it is
        rule = "takes this rank's part of tensors that are spread over ranks alike"
        raise ConfigError("implementation", name, rule, fix="implementation='auto'")
    if isinstance(param.p, DTensor) and param.is_rounded:
        rule = "bfloat16 states need gradients that are spread over ranks as their parameters are"
        raise ConfigError("state_dtype", str(param.p.placements), rule, fix="state_dtype=fp32")
    if name == "auto":
        if group["foreach"] is not None:
            return "foreach" if group["foreach"] else "eager"
        return _best(param, capturable=group["capturable"])
    if name in _REFUSALS and (rule := _REFUSALS[name](param)):
        raise ConfigError("implementation", name, rule, fix="implementation='auto'")
    return name


def _best(param: ParamTensors, *, capturable: bool) -> str:
    p = param.p
    if type(p) not in _PLAIN:  # a subclass may give operations a meaning of its own
        return "eager"
    if p.is_cpu:
        if capturable:
            return "eager"
        return "eager" if native.refusal(param) else "c"
    has_foreach = p.device.type in ("cuda", "xpu") and not capturable and not param.is_rounded
    if p.is_cuda and (not has_foreach or p.numel() >= LARGE) and not gpu.refusal(param):
        return "triton"
    return "foreach" if has_foreach else "eager"


def local_tensors(param: ParamTensors) -> ParamTensors:
    """Return this rank's local tensors of a parameter whose tensors are DTensors, any other as it is.

    The update is element by element: a DTensor's dispatch, three times the cost of the update, has nothing to add.
    Where the gradient lies otherwise than the parameter, the parameter is left to it.
    """
    if type(param.p) in _PLAIN and type(param.g) in _PLAIN:
        return param
    *whole, element_ranges = param  # the ranges are this rank's already
    tensors = [x for x in whole if x is not None]
    if not all(isinstance(x, DTensor) for x in tensors):
        return param
    placements = param.p.placements  # type: ignore[attr-defined]
    if any(x.placements != placements for x in tensors) or any(x.is_partial() for x in placements):  # type: ignore[attr-defined]
        return param
    return ParamTensors(*(None if x is None else x.to_local() for x in whole), element_ranges=element_ranges)  # type: ignore[attr-defined,arg-type,misc]


def run(name: str, params: list[ParamTensors], scalars: UpdateScalars) -> None:
    """Update rows of one device and type with numbers from the host."""
    if name == "eager":
        for param in params:
            update.ademamix_update(*param[:5], scalars, copy=param.copy, element_ranges=param.element_ranges)
    else:
        _UPDATES[name](params, scalars)


_REFUSALS = {"c": native.refusal, "triton": gpu.refusal}
_UPDATES = {"c": native.update, "triton": gpu.update, "foreach": update.foreach_update}
