"""What resuming on other ranks may change (rounding) and what it may not (all else)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support import toy
from support.saving import ORIGIN, save

from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.distributed.world import World, seed_step

NUM_BEFORE, NUM_AFTER = 5, 50


def train(world: World, engine: str, folder: Path, steps: range, **training: Any) -> list[tuple[float, float]]:
    """Train over ``steps``, from the checkpoint where there is one, and save at the end; return losses and rates."""
    config = toy.make_config(engine, max_steps=80, **training)
    built = toy.build(world, config)
    checkpoint = select(LocalStore(folder), world=world).checkpoint
    if checkpoint is not None:
        built.load(checkpoint, num_updates=steps.start)
        checkpoint.close()
    reports = []
    for step in steps:
        seed_step(0, step=step, rank=world.rank)
        reports.append(built.train_step(toy.micro_batches(config, world, step)))
    if checkpoint is None:
        shards = built.shards()
        save(LocalStore(folder), shards, world=world, step=steps.stop, samples_seen=0, trainer={}, origin=ORIGIN)
    built.close()
    return [(report.loss, report.lr) for report in reports]


def options(lr: dict[str, Any]) -> dict[str, Any]:
    return {"lr": {"rate": 0.02, "warmup": 3, "min": 1e-4, **lr}}


def train_with(world: World, engine: str, folder: Path, first: int, last: int, lr: dict[str, Any]) -> list:
    return train(world, engine, folder, range(first, last), **options(lr))


@pytest.fixture(scope="module")
def begun(ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    """A checkpoint after a few steps of zero2 on 2 ranks, and what the next steps are there."""
    folder = tmp_path_factory.mktemp("begun")
    ranks(2).run(train_with, "zero2", folder, 0, NUM_BEFORE, {})
    return folder, ranks(2).run(train_with, "zero2", folder, NUM_BEFORE, NUM_BEFORE + NUM_AFTER, {})[0]


@pytest.mark.parametrize(
    ("engine", "size"), [("zero2", 1), ("zero3", 4), ("fsdp2", 4), ("ddp", 1), ("zero1", 2), ("fsdp2", 2)]
)
def test_the_next_50_losses_agree_within_rounding(ranks, begun, engine: str, size: int) -> None:
    folder, expected = begun
    actual = ranks(size).run(train_with, engine, folder, NUM_BEFORE, NUM_BEFORE + NUM_AFTER, {})
    assert all(other == actual[0] for other in actual[1:])
    assert [lr for _, lr in actual[0]] == [lr for _, lr in expected]
    assert actual[0][0][0] == pytest.approx(expected[0][0], rel=1e-6), "the first loss is that of the same state"
    assert [loss for loss, _ in actual[0]] == pytest.approx([loss for loss, _ in expected], rel=1e-4)


def test_a_changed_length_of_the_schedule_takes_effect(ranks, begun) -> None:
    folder, expected = begun
    changed = ranks(2).run(train_with, "zero2", folder, NUM_BEFORE, NUM_BEFORE + 5, {"iterations": 20})[0]
    assert changed[0][0] == expected[0][0], "the state is the same"
    rates = [lr for _, lr in changed]
    assert all(new < old for new, (_, old) in zip(rates, expected, strict=False))
    cosine = [1e-4 + (0.02 - 1e-4) * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(NUM_BEFORE, NUM_BEFORE + 5)]
    assert rates == pytest.approx(cosine)
