"""Checkpoints for tests that need no engine: one rank's tensors, and a rank that is alone."""

from __future__ import annotations

from typing import Any

import torch

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import Store
from anemoi_dist.checkpoint.writer import save

FACTS: dict[str, Any] = {"engine": "toy", "config_hash": "0", "versions": {}}


class Alone:
    """The one rank of a test that needs no processes."""

    rank, world_size, is_main, device = 0, 1, True, torch.device("cpu")

    def broadcast_text(self, text: str | None) -> str:
        assert text is not None
        return text

    def gather_text(self, text: str) -> list[str]:
        return [text]


def shard(values: torch.Tensor, *, fqn: str = "w", kind: str = "param") -> Shard:
    return Shard(fqn, kind, tuple(values.shape), 0, values.reshape(-1))


def save_values(store: Store, *, step: int, values: torch.Tensor, trainer: dict[str, Any] | None = None) -> Any:
    return save(
        store,
        [shard(values), shard(torch.tensor([float(step)]), kind="step")],
        world=Alone(),  # type: ignore[arg-type]
        step=step,
        samples_seen=8 * step,
        trainer=trainer if trainer is not None else {"progress": {"step": step}},
        facts=FACTS,
    )


def read_all(checkpoint: Checkpoint, fqn: str = "w", kind: str = "param") -> torch.Tensor:
    info = checkpoint.tensors()[fqn, kind]
    out = torch.empty(info.global_shape, dtype=info.dtype).reshape(-1)
    checkpoint.read(fqn, kind, start=0, out=out)
    return out.view(info.global_shape)
