"""What stays, what goes, and that a kill in between costs nothing."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.saving import SingleRank, save_values

from anemoi_dist.checkpoint import store as store_module
from anemoi_dist.checkpoint.manifest import MANIFEST_FILE, TRAINER_FILE, Manifest
from anemoi_dist.checkpoint.retention import Candidate, Policy, prune, to_delete
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.checkpoint.verified import MAX_OPEN_FILES, SavedCheckpoint
from anemoi_dist.evaluation.summary import summarise


def make(folder: Path, *steps: int) -> LocalStore:
    store = LocalStore(folder)
    for step in steps:
        save_values(store, step=step, values=torch.arange(10.0) + step)
    return store


@pytest.mark.parametrize(
    ("policy", "deleted"),
    [
        (Policy(None), []),
        (Policy(2), [30, 20, 10]),
        (Policy(1, keep_every=20), [30, 10]),
        (Policy(1, keep_best="rmse"), [40, 30, 10]),
        (Policy(1, keep_best="acc"), [40, 20, 10]),
        (Policy(1, keep_every=40, keep_best="rmse"), [30, 10]),
    ],
)
def test_the_last_every_nth_and_the_best_stay(policy: Policy, deleted: list[int]) -> None:
    scores = {
        10: {},
        20: {"rmse": 0.5, "acc": 0.1},
        30: {"rmse": 0.7, "acc": 0.9},
        40: {"rmse": 0.6, "acc": 0.2},
        50: {"rmse": float("nan")},
    }
    assert to_delete([Candidate(step, values) for step, values in scores.items()], policy) == deleted


@given(
    steps=st.sets(st.integers(1, 200), min_size=1),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 50),
    rmse=st.dictionaries(st.integers(1, 200), st.floats(0, 2)),
)
def test_the_newest_always_stays_and_a_second_time_nothing_goes(steps, keep_last, keep_every, rmse) -> None:
    policy = Policy(keep_last, keep_every, "rmse")
    candidates = [Candidate(step, {"rmse": rmse[step]} if step in rmse else {}) for step in sorted(steps)]
    deleted = set(to_delete(candidates, policy))
    kept = steps - deleted
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert not deleted & {step for step in steps if keep_every and step % keep_every == 0}
    assert to_delete([c for c in candidates if c.step in kept], policy) == []


def test_broken_ones_do_not_count(tmp_path: Path) -> None:
    store = make(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "step-00000005" / MANIFEST_FILE).write_text("{}")
    shard = tmp_path / "step-00000004" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert prune(store, Policy(2), broken={3}) == []
    assert prune(store, Policy(1), broken={3}) == [1]
    assert store.steps() == [5, 4, 3, 2]


def test_the_best_is_found_by_what_was_saved_with_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step, rmse in ((1, 0.9), (2, 0.4), (3, 0.8), (4, 0.7)):
        save_values(store, step=step, values=torch.ones(3), trainer={"scores": {"rmse": rmse}})
    assert prune(store, Policy(1, keep_best="rmse")) == [3, 1]
    assert store.steps() == [4, 2]


def test_a_kill_between_any_two_of_its_steps_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def countdown(function, left: list[int]):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return function(*args, **kwargs)

        return call

    num_points = 0
    while True:
        folder = tmp_path / str(num_points)
        folder.mkdir()
        store = make(folder, 1, 2, 3, 4)
        left = [num_points]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", countdown(Path.unlink, left))
            patch.setattr(store_module, "fsync_directory", countdown(store_module.fsync_directory, left))
            for name in ("unlink", "rmdir"):
                patch.setattr(shutil.os, name, countdown(getattr(shutil.os, name), left))
            try:
                prune(store, Policy(2))
                killed = False
            except KilledError:
                killed = True
        selection = select(store, world=SingleRank(), strict=True)
        assert selection.checkpoint is not None and selection.checkpoint.manifest.step == 4
        save_values(store, step=5, values=torch.ones(10))
        prune(store, Policy(2))
        assert store.steps() == [5, 4], "the next time clears up"
        if not killed:
            break
        num_points += 1
    assert num_points >= 8  # two checkpoints; manifest, fsync, files and directory of each


def test_scores_become_one_number_without_a_unit() -> None:
    def score(forecast, variable, rmse, acc=None):
        return SimpleNamespace(forecast=forecast, variable=variable, lead_s=1, rmse=rmse, acc=acc)

    scores = [score("model", "msl", 100, 0.5), score("persistence", "msl", 200), score("model", "t", 3, 0.7)]
    scores += [score("persistence", "t", 3), score("climatology", "t", 9)]
    assert summarise(scores) == pytest.approx({"rmse": 0.75, "acc": 0.6})
    assert summarise([]) == {}


def test_a_checkpoint_may_have_more_files_than_may_be_open(tmp_path: Path) -> None:
    store = make(tmp_path, 10, 20)
    for step in (10, 20):
        add_files(store.path(step), 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(soft) if number not in in_use]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[2 * MAX_OPEN_FILES], hard))
    try:
        assert prune(store, Policy(1)) == [10]
        checkpoint = SavedCheckpoint(store.path(20))
        checkpoint.verify()
        checkpoint.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def add_files(folder: Path, number: int) -> None:
    """Add copies of the only rank's file, as if as many ranks had written."""
    manifest = Manifest.from_json((folder / MANIFEST_FILE).read_text())
    [name] = [name for name in manifest.files if name != TRAINER_FILE]
    for rank in range(1, number + 1):
        copy = name.replace("0", str(rank), 1)
        shutil.copy(folder / name, folder / copy)
        manifest.files[copy] = manifest.files[name]
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
