"""Committed checkpoints for tests, without a run that trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.ranks import SingleRank
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import LocalStore
from support.saving import save


def save_tensors(folder: Path, tensors: Mapping[tuple[str, str], torch.Tensor], *, step: int = 10) -> Path:
    """Commit whole tensors, each cut into two ranges."""
    shards = []
    for (fqn, kind), tensor in tensors.items():
        flat = tensor.reshape(-1)
        cut = flat.numel() // 3
        for start, piece in ((0, flat[:cut]), (cut, flat[cut:])):
            if piece.numel():
                shards.append(Shard(fqn, kind, tuple(tensor.shape), start, piece))
    folder.mkdir(parents=True, exist_ok=True)
    origin = Origin(engine="toy", config_hash="0", versions={"torch": "2"})
    progress = {"progress": {"step": step, "num_skipped_in_row": 0}}
    store = LocalStore(folder)
    save(store, shards, world=SingleRank(), step=step, samples_seen=8 * step, trainer=progress, origin=origin)
    return store.path(step)


def example_tensors(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """A weight, a bf16 bias, their states, and a buffer of integers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 5, generator=generator)
    return {
        ("net.weight", "param"): weight,
        ("net.weight", "exp_avg_sq"): weight.square(),
        ("net.weight", "step"): torch.tensor(10.0),
        ("net.bias", "param"): torch.randn(5, generator=generator).bfloat16(),
        ("net.calls", "buffer"): torch.tensor([3, 4], dtype=torch.int64),
    }
