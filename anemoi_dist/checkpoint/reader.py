"""A committed checkpoint as torch tensors, read by ranges from verified hash blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from anemoi_dist.checkpoint.shard import DTYPES, TensorInfo
from anemoi_dist.checkpoint.verified import SavedCheckpoint


class Checkpoint(SavedCheckpoint):
    """A committed checkpoint, as a source for an engine to load from."""

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """Return shape and type of every tensor, by ``(fqn, kind)``."""
        return {key: TensorInfo(tuple(t.shape), DTYPES[t.dtype]) for key, t in self._tensors.items()}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on, converted to its type."""
        dtype = DTYPES[self._tensors[fqn, kind].dtype]
        direct = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        target = out if direct else torch.empty(out.numel(), dtype=dtype)
        self.read_bytes(fqn, kind, start=start, out=target.detach().view(torch.uint8).numpy().data)
        if not direct:
            out.copy_(target)
