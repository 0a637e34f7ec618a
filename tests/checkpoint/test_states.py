"""A machine that trains, saves, crashes, damages, prunes, resumes and resizes at random; the reference always holds.

Single-process: the ranks are simulated, their partitions are those of the engines (equal pieces, rows, whole).
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.saving import ORIGIN, SingleRank

from anemoi_dist.checkpoint import store as store_module
from anemoi_dist.checkpoint import writer
from anemoi_dist.checkpoint.manifest import MANIFEST_FILE
from anemoi_dist.checkpoint.retention import Policy, prune
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.errors import CheckpointError

SHAPES = {"a": (7, 3), "b": (5,), "c": (1,), "d": (2, 2, 3)}


class CrashError(BaseException):
    """The process is gone: no handler of ours may run after it."""


def train(state: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """One step: a function of the state and the step, so that a run has one true course."""
    return {name: value * 1.25 + step + index for index, (name, value) in enumerate(state.items())}


def cuts(name: str, num_ranks: int, engine: str) -> list[int]:
    """Borders of the pieces of a tensor, one piece a rank."""
    numel = torch.Size(SHAPES[name]).numel()
    if engine == "whole":  # every rank holds all, and saves its share
        return [numel * rank // num_ranks for rank in range(num_ranks + 1)]
    unit = numel // SHAPES[name][0] if engine == "rows" else 1
    chunk = -(-(numel // unit) // num_ranks) * unit
    return [min(chunk * rank, numel) for rank in range(num_ranks + 1)]


def shards_of(state: dict[str, torch.Tensor], rank: int, num_ranks: int, engine: str) -> list[Shard]:
    shards = []
    for name, value in state.items():
        low, high = cuts(name, num_ranks, engine)[rank : rank + 2]
        if low < high:
            shards.append(Shard(name, "param", SHAPES[name], low, value.reshape(-1)[low:high]))
    return shards


class Checkpoints(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = LocalStore(self.folder)
        self.ids = itertools.count()
        self.reference = {0: {name: torch.zeros(shape) for name, shape in SHAPES.items()}}
        self.step, self.state = 0, self.reference[0]
        self.whole: set[int] = set()  # committed, not damaged since
        self.broken: set[int] = set()  # what a resume has passed over
        self.num_ranks, self.engine = 1, "whole"
        self.policy = Policy(3)
        self.last_id = ""

    @initialize(keep_last=st.integers(1, 3), keep_every=st.none() | st.integers(2, 5))
    def configure(self, keep_last: int, keep_every: int | None) -> None:
        self.policy = Policy(keep_last, keep_every)

    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            self.state = train(self.state, self.step)
            self.reference.setdefault(self.step, self.state)

    @rule(num_ranks=st.integers(1, 4), engine=st.sampled_from(["whole", "rows", "flat"]))
    def resize(self, num_ranks: int, engine: str) -> None:
        """Go on with another number of ranks or engine, which is a resume."""
        self.num_ranks, self.engine = num_ranks, engine
        self.resume()

    @rule()
    def save(self) -> None:
        if self.step in self.whole or self.step == 0:
            return
        self._save()
        self._prune()

    @rule(after=st.integers(0, 30))
    def crash_while_saving(self, after: int) -> None:
        """Save and prune, killed before one of the calls that change the disk."""
        if self.step in self.whole or self.step == 0:
            return
        with pytest.MonkeyPatch.context() as patch:
            left = itertools.count(after, -1)

            def dying(function: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if next(left) <= 0:
                        raise CrashError
                    return function(*args, **kwargs)

                return call

            for owner, name in (
                (writer.HashingFile, "_append"),
                (store_module, "write_atomically"),
                (store_module, "fsync_directory"),
                (os, "fsync"),
                (Path, "mkdir"),
                (Path, "rename"),
                (Path, "unlink"),
                (os, "unlink"),
                (os, "rmdir"),
            ):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                self._save()
                self._prune()
            except CrashError:
                pass
        # The kill came before or after the rename; retention may have deleted what it may delete, no more.
        present = {s for s in self.store.steps() if (self.store.path(s) / MANIFEST_FILE).exists()}
        if self.step in present and self.last_id in (self.store.path(self.step) / MANIFEST_FILE).read_text("latin-1"):
            self.whole.add(self.step)
        assert self.whole - present <= self._deletable()
        self.whole &= present
        self.resume()

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Damage any checkpoint but the last good one."""
        if len(self.whole) < 2:
            return
        step = data.draw(st.sampled_from(sorted(self.whole)))
        path = data.draw(st.sampled_from(sorted(self.store.path(step).iterdir())))
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "truncate", "delete", "double"]))
        if kind == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(content)
        elif kind == "truncate":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        elif kind == "delete":
            path.unlink()
        else:
            path.write_bytes(content + content)
        self.whole.discard(step)

    @rule()
    def resume(self) -> None:
        """Start anew from what is on the disk."""
        if not self.store.steps():
            self.step, self.state = 0, self.reference[0]
            return
        try:
            selection = select(self.store, world=SingleRank())  # type: ignore[arg-type]
        except CheckpointError:
            assert not self.whole
            raise
        assert selection.checkpoint is not None
        self.step = selection.checkpoint.manifest.step
        assert self.step == max(self.whole), "not the newest that is whole"
        self.broken = set(selection.passed_over)
        loaded = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
        for rank in range(self.num_ranks):
            for shard in shards_of(loaded, rank, self.num_ranks, self.engine):
                selection.checkpoint.read(shard.fqn, "param", start=shard.start, out=shard.tensor)
        selection.checkpoint.close()
        self.state = loaded

    @invariant()
    def the_newest_that_is_whole_equals_the_reference(self) -> None:
        for name, value in self.reference[self.step].items():
            assert torch.equal(self.state[name], value), f"step {self.step} {name}"
        if not self.whole:
            return
        checkpoint = select(self.store, world=SingleRank()).checkpoint  # type: ignore[arg-type]
        assert checkpoint is not None and checkpoint.manifest.step == max(self.whole)
        for name, value in self.reference[max(self.whole)].items():
            out = torch.empty(value.numel())
            checkpoint.read(name, "param", start=0, out=out)
            assert torch.equal(out.view(value.shape), value)
        checkpoint.close()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _save(self) -> None:
        save_id = self.last_id = f"{next(self.ids):016x}"
        folder = self.store.begin(self.step, save_id)
        reports = [
            writer.write_rank(
                folder, shards_of(self.state, rank, self.num_ranks, self.engine), save_id=save_id, rank=rank
            )
            for rank in range(self.num_ranks)
        ]
        writer.commit(
            self.store, folder, reports, save_id=save_id, step=self.step, samples_seen=0, origin=ORIGIN, trainer={}
        )
        self.whole.add(self.step)
        self.broken.discard(self.step)

    def _prune(self) -> None:
        deleted = prune(self.store, self.policy, broken=self.broken)
        assert set(deleted) & self.whole <= self._deletable()
        assert max(self.whole) not in deleted
        self.whole -= set(deleted)

    def _deletable(self) -> set[int]:
        every = self.policy.keep_every
        return {s for s in self.whole if s != max(self.whole) and not (every and s % every == 0)}


Checkpoints.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestQuick = Checkpoints.TestCase


@pytest.mark.slow
def test_thousands_of_cases() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Checkpoints,
        settings=settings(
            max_examples=500, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
