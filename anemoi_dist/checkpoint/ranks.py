"""The ranks that save or load a checkpoint together, as far as this room must know them."""

from __future__ import annotations

from typing import Protocol

import torch


class Ranks(Protocol):
    """Rank, world size and two exchanges of text; :class:`~anemoi_dist.distributed.world.World` is one."""

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which commits and decides."""

    @property
    def device(self) -> torch.device:
        """Device that holds this rank's shards."""

    def broadcast_text(self, text: str | None) -> str:
        """Return rank 0's ``text`` on every rank. Collective."""

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's ``text`` on rank 0, an empty list elsewhere. Collective."""


class SingleRank:
    """A process without process group, which imports a checkpoint for instance."""

    rank, world_size, is_main, device = 0, 1, True, torch.device("cpu")

    def broadcast_text(self, text: str | None) -> str:
        """Return ``text``."""
        assert text is not None, "rank 0 has the text"
        return text

    def gather_text(self, text: str) -> list[str]:
        """Return the one text."""
        return [text]
