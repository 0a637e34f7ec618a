"""The common form of what every reader of a foreign format returns, and the rules that readers share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from anemoi_dist.checkpoint.safetensors_format import TYPES
from anemoi_dist.checkpoint.shard import DTYPE_NAMES, Shard
from anemoi_dist.errors import ConfigError

#: Floating buffers of torch's own normalisation layers, which lie among the parameters.
_BUFFERS = ("running_mean", "running_var")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another program, read into memory.

    Attributes
    ----------
    format : str
        What it turned out to be: ``lightning``, ``torch``, ``zero1`` to ``zero3`` or ``dcp``.
    step : int | None
        Optimizer steps done, where the source says it.
    shards : list[Shard]
        Parameters, buffers and optimizer states: whole tensors or ranges of them.
    """

    format: str
    step: int | None
    shards: list[Shard]


def checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that a checkpoint can hold.

    Raises
    ------
    ConfigError
        It is sparse, nested, quantised, of a type that is not saved, or has no data.
    """
    kind = "nested" if tensor.is_nested else str(tensor.layout)
    if tensor.is_nested or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES or tensor.is_meta:
        what = "a meta tensor, which has no data" if tensor.is_meta else f"{tensor.dtype}, {kind}"
        raise ConfigError("SOURCE", name, f"is {what}: only dense tensors of plain types are read", valid=TYPES)
    return tensor


def whole(fqn: str, kind: str, tensor: torch.Tensor) -> Shard:
    """Return a whole tensor as a shard."""
    return Shard(fqn, kind, tuple(tensor.shape), 0, checked(fqn, tensor).detach().reshape(-1))


def kind_of(name: str, tensor: torch.Tensor, *, trained: Collection[str]) -> str:
    """Return ``param`` or ``buffer`` for a tensor of a state dictionary, which does not say it.

    A floating one without a state may be a frozen parameter; loading goes by the name, so nothing depends on it.
    """
    is_buffer = not tensor.is_floating_point() or name.rpartition(".")[2] in _BUFFERS
    return "buffer" if is_buffer and name not in trained else "param"


def state_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of one parameter's optimizer state; a counter that is a number becomes a 0-d tensor."""
    numbers = {kind: torch.tensor(float(x)) for kind, x in state.items() if isinstance(x, int | float)}
    return numbers | {kind: checked(kind, x) for kind, x in state.items() if isinstance(x, torch.Tensor)}
