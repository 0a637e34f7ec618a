"""Selection of the checkpoint to resume from: the newest that verifies, each rank checking a share of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from anemoi_dist.checkpoint.ranks import Ranks
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.store import Store
from anemoi_dist.errors import CheckpointError


@dataclass
class Selection:
    """The checkpoint that a run resumes from.

    Attributes
    ----------
    checkpoint : Checkpoint or None
        Open on every rank; None if the run has not saved anything.
    passed_over : dict[int, str]
        Steps of newer checkpoints that are damaged, and how.
    """

    checkpoint: Checkpoint | None = None
    passed_over: dict[int, str] = field(default_factory=dict)


def select(store: Store, *, world: Ranks, strict: bool = False) -> Selection:
    """Return the newest checkpoint that verifies. Collective.

    Parameters
    ----------
    store : Store
        The run's checkpoints; every rank sees the same.
    world : Ranks
        The ranks that resume. Every block of every file is read by one of them.
    strict : bool, optional
        Refuse to pass over a damaged checkpoint.

    Raises
    ------
    CheckpointError
        There are checkpoints and none can be loaded, or the newest cannot and ``strict`` is set. Raised on every rank,
        with what is wrong with each.
    """
    # Rank 0's list counts: on a shared file system ranks may not see a new directory at the same time, and ranks that
    # resume from different steps would diverge without any error.
    steps = json.loads(world.broadcast_text(json.dumps(store.steps()) if world.is_main else None))
    selection = Selection()
    for step in steps:
        checkpoint, error = _verify_share(store, step, rank=world.rank, num_ranks=world.world_size)
        # A rank may see damage that others do not: its share of the blocks, or its own view of the file system.
        errors = world.gather_text(error)
        problem = world.broadcast_text(next(filter(None, errors), "") if world.is_main else None)
        if not problem:
            selection.checkpoint = checkpoint
            return selection
        if checkpoint is not None:
            checkpoint.close()
        selection.passed_over[step] = problem
        if strict:
            raise CheckpointError(
                f"checkpoint {store.path(step).name} is damaged: {problem}\n"
                "  fix: checkpoint.strict=false continues from the newest one that is whole"
            )
    if steps:
        listed = "\n".join(f"  {store.path(step).name}: {why}" for step, why in selection.passed_over.items())
        raise CheckpointError(
            f"none of this run's {len(steps)} checkpoints is whole:\n{listed}\n"
            "  fix: restore one, or take another run.id to start from step 0"
        )
    return selection


def _verify_share(store: Store, step: int, *, rank: int, num_ranks: int) -> tuple[Checkpoint | None, str]:
    """Open a checkpoint and check this rank's share of its blocks; return it with what is wrong, or an empty text."""
    checkpoint = None
    try:
        checkpoint = Checkpoint(store.path(step))
        if checkpoint.manifest.step != step:
            raise CheckpointError(f"its manifest is of step {checkpoint.manifest.step}")
        checkpoint.verify(share=rank, num_shares=num_ranks)
        checkpoint.trainer()
    except CheckpointError as error:
        return checkpoint, str(error)
    return checkpoint, ""
