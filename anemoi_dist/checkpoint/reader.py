"""Loading by ranges: every block that is read is checked against the manifest before a byte of it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from anemoi_dist.checkpoint.dtypes import DTYPES
from anemoi_dist.checkpoint.ranges import SavedCheckpoint, VerifiedFile
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.engines.base import TensorInfo
from anemoi_dist.errors import CheckpointError


class Checkpoint(SavedCheckpoint):
    """A committed checkpoint, as a source for an engine to load from."""

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """Return what there is, by ``(fqn, kind)``."""
        return {key: TensorInfo(tuple(t.shape), DTYPES[t.dtype]) for key, t in self._tensors.items()}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on, converted to its type."""
        dtype = DTYPES[self._tensors[fqn, kind].dtype]
        direct = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        target = out if direct else torch.empty(out.numel(), dtype=dtype)
        self.read_bytes(fqn, kind, start=start, out=target.detach().view(torch.uint8).numpy().data)
        if not direct:
            out.copy_(target)


def find_newest(store: LocalStore, *, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None where nothing was ever saved.

    Parameters
    ----------
    store : LocalStore
        Where to look.
    report : Callable[[str], None]
        Told of each directory that was passed over, and why.

    Raises
    ------
    CheckpointError
        There are checkpoints and none is whole: to start anew in silence would bury them.
    """
    steps = store.steps()
    for step in steps:
        try:
            checkpoint = Checkpoint(store.path(step))
            if checkpoint.manifest.step != step:
                raise CheckpointError(f"its manifest is of step {checkpoint.manifest.step}")
            checkpoint.verify()
        except CheckpointError as error:
            report(f"checkpoint {store.path(step).name} is passed over: {error}")
        else:
            return checkpoint
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {store.folder} is whole; restore one, or take another run.id to "
            "start anew"
        )
    return None


def prune(store: LocalStore, *, keep_last: int | None) -> list[int]:
    """Delete all but the newest ``keep_last`` checkpoints that have a valid manifest; return the steps deleted."""
    if keep_last is None:
        return []
    valid = []
    for step in store.steps():
        try:
            Checkpoint(store.path(step))
        except CheckpointError:
            continue
        valid.append(step)
    for step in valid[keep_last:]:
        store.remove(step)
    return valid[keep_last:]


__all__ = ["Checkpoint", "VerifiedFile", "find_newest", "prune"]
