"""Anemoi-training's task goes on exactly: across kills, the growth of its rollout, other engines and other ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import toy
from support.anemoi import PROCESSED, compose_small, steps_of
from support.saving import ORIGIN, save

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.tasks import create_task

#: The rollout grows after steps 2 and 4.
STEPS_PER_EPOCH, SAVED, END = 2, 2, 4


def compose(root: Path, *, engine: str, precision: str = "fp32", ranks: int = 2) -> Config:
    """Two samples a rank on 3 ranks, three on 2, all on one."""
    overrides = (
        *PROCESSED,
        "training/optimization/optimizer=ademamix",
        f"training.max_steps={END}",
        f"dataloader.limit_batches.training={STEPS_PER_EPOCH}",
        f"training.optimization.lr={2e-3 / ranks}",  # theirs multiplies it by the ranks; a run keeps its first product
    )
    ours = (f"engine={engine}", f"training.precision={precision}", "training.global_batch_size=6")
    return compose_small("config", *overrides, root=root, ranks=ranks, ours=ours)


def train(world: World, config: Config, folder: Path, resume: bool) -> dict[str, Any]:
    """Train to the end from the start, saving on the way, or from what was saved."""
    task = create_task(config)
    engine = create_engine(task.create_module(world_size=world.world_size), config=config, world=world)
    store, losses, loaded = LocalStore(folder), [], []
    if resume:
        checkpoint = Checkpoint(folder / f"step-{SAVED:08d}")
        task.load_state_dict(checkpoint.trainer()["task"])
        engine.load(checkpoint, num_updates=SAVED)
        loaded = toy.clone_shards(engine)
    for step, micro_batches in steps_of(task, config, world, start=SAVED if resume else 0):
        losses.append(engine.train_step(micro_batches).loss)
        if step + 1 == SAVED:
            trainer = {"task": task.state_dict()}
            origin = replace(ORIGIN, engine=config.engine.spec.name)
            save(store, engine.shards(), world=world, step=SAVED, samples_seen=0, trainer=trainer, origin=origin)
            loaded = toy.clone_shards(engine)
    result = {"losses": losses, "at_save": loaded, "at_end": toy.clone_shards(engine), "rollout": task.state_dict()}
    engine.close()
    return result


def whole(results: list[dict[str, Any]], name: str) -> dict[Any, torch.Tensor]:
    return toy.whole_tensors([result[name] for result in results])


def assert_equal(actual: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("zero2", "fp32"),
        pytest.param("ddp", "bf16", marks=pytest.mark.slow),
        pytest.param("zero1", "fp32", marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", marks=pytest.mark.slow),
        pytest.param("zero3_offload", "fp32", marks=pytest.mark.slow),
        pytest.param("fsdp2", "bf16", marks=pytest.mark.slow),
    ],
)
def test_goes_on_exactly_over_the_growth_of_the_rollout(ranks, tmp_path: Path, engine: str, precision: str) -> None:
    config = compose(tmp_path, engine=engine, precision=precision)
    straight = ranks(2).run(train, config, tmp_path, False)
    resumed = ranks(2).run(train, config, tmp_path, True)
    assert resumed[0]["losses"] == straight[0]["losses"][SAVED:]
    assert_equal(whole(resumed, "at_end"), whole(straight, "at_end"))
    assert resumed[0]["rollout"] == straight[0]["rollout"]
    assert straight[0]["rollout"]["runtime"]["rollout"]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks_then"), [("fsdp2", 1), ("zero3", 2), ("ddp", 3)], ids=lambda value: str(value)
)
def test_goes_on_under_another_engine_on_other_ranks(ranks, tmp_path: Path, engine: str, ranks_then: int) -> None:
    straight = ranks(2).run(train, compose(tmp_path, engine="zero2"), tmp_path, False)
    resumed = ranks(ranks_then).run(train, compose(tmp_path, engine=engine, ranks=ranks_then), tmp_path, True)
    assert_equal(whole(resumed, "at_save"), whole(straight, "at_save"))
    # Sums over other ranks have other last bits.
    assert resumed[0]["losses"] == pytest.approx(straight[0]["losses"][SAVED:], rel=1e-5)
    assert resumed[0]["rollout"] == straight[0]["rollout"]
