"""What a new run begins with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support import toy
from support.saving import save, save_values

from anemoi_dist.checkpoint.initial import find_initial
from anemoi_dist.checkpoint.matching import WeightsOnly
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.store import LocalStore, open_store
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "first")
    run.create()
    run.config_file.write_text("checkpoint: {url: null}\n")
    for step in (10, 20):
        save_values(open_store(run, None), step=step, values=torch.arange(10.0) + step)
    return run


def folder(run: RunDirectory, step: int) -> Path:
    return run.path / "checkpoints" / f"step-{step:08d}"


def test_a_run_a_step_of_it_or_a_directory(run: RunDirectory) -> None:
    root = str(run.path.parent)
    assert find_initial("first", root=root) == folder(run, 20)
    assert find_initial("first@10", root=root) == folder(run, 10)
    assert find_initial(f"{run.path}@10", root="elsewhere") == folder(run, 10)
    assert find_initial(str(folder(run, 10)), root="elsewhere") == folder(run, 10)
    (folder(run, 20) / "manifest.json").unlink()
    assert find_initial("first", root=root) == folder(run, 10), "what a kill has left is passed over"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("second", "is neither a run"),
        ("first@15", "valid: first@20, first@10"),
        ("empty", "holds no whole checkpoint: nothing is saved there"),
    ],
)
def test_what_is_not_there_is_one_error(run: RunDirectory, name: str, said: str) -> None:
    empty = RunDirectory(run.path.parent / "empty")
    empty.create()
    with pytest.raises(ConfigError, match=r"checkpoint\.init_from") as raised:
        find_initial(name, root=str(run.path.parent))
    assert said in str(raised.value).replace("\n  ", "; ")
    shutil.rmtree(empty.path)


def begin(world: World, engine: str, path: Path, with_states: bool) -> tuple[list, list, list]:
    """Return the shards that were saved after two steps, those of a new engine, and those that begin from them."""
    config = toy.make_config(engine)
    first = toy.build(world, config)
    for step in range(2):
        first.train_step(toy.micro_batches(config, world, step))
    saved = toy.clone_shards(first)
    save(LocalStore(path), first.shards(), world=world, step=2)
    first.close()
    second = toy.build(world, config)
    new = toy.clone_shards(second)
    checkpoint = Checkpoint(LocalStore(path).path(2))
    second.load(checkpoint if with_states else WeightsOnly(checkpoint), num_updates=0)
    begun = toy.clone_shards(second)
    assert second.train_step(toy.micro_batches(config, world, 0)).lr == pytest.approx(0.02 / 3, rel=0.7), "it warms up"
    second.close()
    return saved, new, begun


@pytest.mark.parametrize("with_states", [False, True], ids=["weights", "states"])
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero3", "fsdp2"])
def test_weights_alone_or_with_states(ranks, tmp_path: Path, engine: str, with_states: bool) -> None:
    saved, new, begun = (
        toy.whole_tensors(list(each)) for each in zip(*ranks(2).run(begin, engine, tmp_path, with_states), strict=True)
    )
    assert any(not torch.equal(saved[key], new[key]) for key in saved if key.endswith(":param"))
    for key, value in begun.items():
        is_weight = key.endswith((":param", ":buffer"))
        expected = saved if is_weight or with_states else new
        assert torch.equal(value, expected[key]), key
