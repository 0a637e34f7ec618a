"""The unit of saving and loading: a 1-D shard of a flattened tensor, whoever wrote it and whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from anemoi_dist.checkpoint.safetensors_format import TYPES

#: torch's types by safetensors' names.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, (torch_name, _) in TYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A contiguous range of one flattened parameter, optimizer state or buffer.

    Attributes
    ----------
    fqn : str
        Fully qualified name of the parameter or buffer in the module.
    kind : str
        ``param`` (the fp32 master), ``buffer``, ``weight_average``, or the name of the optimizer state.
    global_shape : tuple[int, ...]
        Shape of the whole tensor.
    start : int
        First element of the range in the flattened whole.
    tensor : torch.Tensor
        1-D and contiguous.
    """

    fqn: str
    kind: str
    global_shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of one whole tensor in a :class:`ShardSource`."""

    global_shape: tuple[int, ...]
    dtype: torch.dtype


class ShardSource(Protocol):
    """A checkpoint that an engine loads from by ranges, whoever wrote it."""

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """Return shape and type of every tensor, by ``(fqn, kind)``."""

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on."""


class WholeTensors:
    """Whole tensors in memory as a source for an engine to load from.

    Parameters
    ----------
    tensors : Mapping[tuple[str, str], torch.Tensor]
        By ``(fqn, kind)``.
    """

    def __init__(self, tensors: Mapping[tuple[str, str], torch.Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """Return shape and type of every tensor, by ``(fqn, kind)``."""
        return {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on, converted to its type."""
        out.copy_(self._tensors[fqn, kind].reshape(-1)[start : start + out.numel()])


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers of a module that are saved, by name."""
    persistent = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}
