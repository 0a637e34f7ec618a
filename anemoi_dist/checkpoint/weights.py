"""A checkpoint's weights in a module of one process, from any engine on any number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from anemoi_dist.checkpoint.export import averages
from anemoi_dist.checkpoint.shard import DTYPES, persistent_buffers
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import CheckpointError


def load_weights(module: nn.Module, checkpoint: SavedCheckpoint, *, averaged: bool, prefix: str = "") -> None:
    """Fill the parameters and persistent buffers of a module, all of them.

    Parameters
    ----------
    module : torch.nn.Module
        On the CPU.
    checkpoint : SavedCheckpoint
        Every hash block that is read is verified.
    averaged : bool
        The averaged weights in the place of the weights.
    prefix : str, optional
        What stands before the module's names in the checkpoint.

    Raises
    ------
    ConfigError
        There are no averaged weights.
    CheckpointError
        The checkpoint is damaged or does not fit the module.
    """
    records = {(r.fqn, r.kind): r for r in checkpoint.manifest.tensors}
    average = averages(checkpoint.manifest) if averaged else {}
    tensors: list[tuple[str, str, torch.Tensor]] = [(name, "param", p) for name, p in module.named_parameters()]
    tensors += [(name, "buffer", buffer) for name, buffer in persistent_buffers(module).items()]
    for name, kind, tensor in tensors:
        fqn = f"{prefix}{name}"
        record = average.get(fqn) or records.get((fqn, kind))  # frozen weights have no average
        if record is None or record.shape != list(tensor.shape):
            found = "is missing" if record is None else f"has shape {record.shape}"
            raise CheckpointError(f"{fqn} {found} in the checkpoint, and shape {list(tensor.shape)} in the model")
        values = torch.empty(record.numel, dtype=DTYPES[record.dtype])
        checkpoint.read_bytes(fqn, record.kind, start=0, out=values.view(torch.uint8).numpy().data)
        tensor.data.copy_(values.view(record.shape))
