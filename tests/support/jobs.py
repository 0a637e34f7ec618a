"""Collective functions that tests run on a pool of ranks; importable by name in every rank."""

from __future__ import annotations

from anemoi_dist.distributed.control_word import ControlWord, Word
from anemoi_dist.distributed.world import World


def exchange_text(world: World) -> tuple[str, list[str], str]:
    return (
        world.broadcast_text("é" * 1000 if world.is_main else None),
        world.gather_text("x" * world.rank),
        world.broadcast_text("" if world.is_main else None),
    )


def agree(world: World, wishes: list[list[Word]]) -> list[Word]:
    """Send this rank's word of each step; return what was agreed on at each."""
    word = ControlWord(world)
    return [word.exchange(wish) for wish in wishes[world.rank]] + [word.finish(), word.finish()]
