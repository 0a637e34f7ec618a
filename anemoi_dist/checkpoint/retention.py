"""Retention: keep the newest, every n-th and the best checkpoint; ignore broken ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from anemoi_dist.checkpoint.manifest import MANIFEST_FILE
from anemoi_dist.checkpoint.store import Store
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import CheckpointError

_MORE_IS_BETTER = {"rmse": False, "acc": True, "loss": False}


@dataclass(frozen=True)
class Policy:
    """Retention rules; see ``checkpoint`` in :mod:`anemoi_dist.config.schema`."""

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that is whole, with the scores of its step."""

    step: int
    scores: Mapping[str, float] = field(default_factory=dict)


def to_delete(candidates: Sequence[Candidate], policy: Policy) -> list[int]:
    """Return the steps to delete, newest first. Pure."""
    if policy.keep_last is None:
        return []
    ordered = sorted(candidates, key=lambda candidate: -candidate.step)
    kept = {candidate.step for candidate in ordered[: policy.keep_last]}
    if policy.keep_every is not None:
        kept |= {candidate.step for candidate in ordered if candidate.step % policy.keep_every == 0}
    if policy.keep_best is not None:
        sign = -1 if _MORE_IS_BETTER[policy.keep_best] else 1
        scores = {c.step: sign * c.scores.get(policy.keep_best, math.nan) for c in ordered}
        finite = [step for step in scores if math.isfinite(scores[step])]
        if finite:  # of equal scores the newest, since `ordered` begins with it
            kept.add(min(finite, key=lambda step: scores[step]))
    return [candidate.step for candidate in ordered if candidate.step not in kept]


def prune(store: Store, policy: Policy, *, broken: Collection[int] = ()) -> list[int]:
    """Delete what the policy does not keep. On one rank, after a save that has been read back.

    Parameters
    ----------
    store : Store
        Where checkpoints live.
    policy : Policy
        What to keep.
    broken : Collection[int], optional
        Steps that failed verification when the run resumed: neither counted nor deleted.

    Returns
    -------
    list[int]
        The steps deleted, newest first.
    """
    steps = [step for step in store.steps() if step not in broken]
    if policy.keep_last is None or len(steps) <= policy.keep_last:
        return []
    # A checkpoint that cannot be opened is neither kept nor deleted: counted as one of `keep_last` it would push out a
    # whole one, and deleted it could not be looked at any more.
    candidates = [candidate for step in steps if (candidate := _candidate(store, step)) is not None]
    deleted = to_delete(candidates, policy)
    whole = {candidate.step for candidate in candidates}
    # A directory without a manifest, older than a whole checkpoint, is what a kill left of an earlier deletion.
    remains = [s for s in steps if s not in whole and s < max(whole, default=0) and not _has_manifest(store, s)]
    for step in [*deleted, *remains]:
        store.remove(step)
    return deleted


def _candidate(store: Store, step: int) -> Candidate | None:
    """Return the checkpoint if its manifest is valid and its files have their sizes; hashing it would read it all."""
    try:
        checkpoint = SavedCheckpoint(store.path(step))
        try:
            if checkpoint.manifest.step != step:
                return None
            checkpoint.check_sizes()
            return Candidate(step, checkpoint.trainer().get("scores") or {})
        finally:
            checkpoint.close()
    except CheckpointError:
        return None


def _has_manifest(store: Store, step: int) -> bool:
    try:
        (store.path(step) / MANIFEST_FILE).open("rb", buffering=0).close()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # not readable now is not absent: what may be a checkpoint is not removed
    return True
