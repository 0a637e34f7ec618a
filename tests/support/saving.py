"""Checkpoints for tests that need no engine: one rank's tensors, saved and waited for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.ranks import Ranks, SingleRank
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Saver
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import Store
from anemoi_dist.config.schema import CheckpointConfig

ORIGIN = Origin(engine="toy", config_hash="0", versions={})


def shard(values: torch.Tensor, *, fqn: str = "w", kind: str = "param") -> Shard:
    return Shard(fqn, kind, tuple(values.shape), 0, values.reshape(-1))


def save(
    store: Store,
    shards: Iterable[Shard],
    *,
    world: Ranks,
    step: int,
    samples_seen: int = 0,
    trainer: Any = None,
    origin: Origin = ORIGIN,
) -> Any:
    """Save and commit, and wait for it. Collective."""
    config = CheckpointConfig(asynchronous=False, on_error="stop", read_back=False, keep_last=None)
    saver = Saver(store, world=world, config=config, origin=origin)
    saver.save(step, lambda: shards, samples_seen=samples_seen, trainer=trainer or {})
    return store.path(step)


def save_values(store: Store, *, step: int, values: torch.Tensor, trainer: dict[str, Any] | None = None) -> Any:
    shards = [shard(values), shard(torch.tensor([float(step)]), kind="step")]
    trainer = {"progress": {"step": step}} if trainer is None else trainer
    return save(store, shards, world=SingleRank(), step=step, samples_seen=8 * step, trainer=trainer)


def read_all(checkpoint: Checkpoint, fqn: str = "w", kind: str = "param") -> torch.Tensor:
    info = checkpoint.tensors()[fqn, kind]
    out = torch.empty(info.global_shape, dtype=info.dtype).reshape(-1)
    checkpoint.read(fqn, kind, start=0, out=out)
    return out.view(info.global_shape)
