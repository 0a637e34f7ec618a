"""Every engine on 1 to 4 ranks writes; every engine on 1 to 4 ranks reads: the same tensors, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import reshard, toy
from support.saving import ORIGIN, save

from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.distributed.world import World

SIZES = (1, 2, 3, 4)
NUM_STEPS = 2
AVERAGING = {"decay": 0.9}
Written = dict[tuple[str, int], tuple[Path, dict[str, torch.Tensor]]]


def write(world: World, engine: str, folder: Path) -> list:
    config = reshard.make_config(engine, weight_averaging=AVERAGING)
    built = reshard.build(world, config)
    for step in range(NUM_STEPS):
        built.train_step(toy.micro_batches(config, world, step))
    save(
        LocalStore(folder),
        built.shards(),
        world=world,
        step=NUM_STEPS,
        samples_seen=0,
        trainer={},
        origin=replace(ORIGIN, engine=engine),
    )
    shards = toy.clone_shards(built)
    built.close()
    return shards


def read(world: World, engine: str, folders: list[Path]) -> list[list]:
    """Load each of the checkpoints into one engine, which has other values before."""
    built = reshard.build(world, reshard.make_config(engine, weight_averaging=AVERAGING))
    loaded = []
    for folder in folders:
        checkpoint = select(LocalStore(folder), world=world).checkpoint
        assert checkpoint is not None
        built.load(checkpoint, num_updates=NUM_STEPS)
        checkpoint.close()
        loaded.append(toy.clone_shards(built))
    built.close()
    return loaded


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("matrix")
    result: Written = {}
    for engine in toy.ENGINES:
        for size in SIZES:
            folder = root / f"{engine}-{size}"
            folder.mkdir()
            result[engine, size] = folder, toy.whole_tensors(ranks(size).run(write, engine, folder))
    return result


@pytest.mark.parametrize(("engine", "size"), [("ddp", 1), ("zero1", 3), ("zero3_offload", 3), ("fsdp2", 3)])
def test_some_of_it(ranks, tmp_path: Path, engine: str, size: int) -> None:
    """2 ranks, then 1, then 3."""
    expected = toy.whole_tensors(ranks(2).run(write, "zero2", tmp_path))
    for num_ranks in (1, size):
        [actual] = zip(*ranks(num_ranks).run(read, engine, [tmp_path]), strict=True)
        actual = toy.whole_tensors(list(actual))
        assert actual.keys() == expected.keys() and "model.head.weight:weight_average" in actual
        for key, value in expected.items():
            assert torch.equal(actual[key], value) and actual[key].dtype == value.dtype, key


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_all_that_was_written_loads(ranks, written: Written, engine: str, size: int) -> None:
    # Every second: each engine reads what every engine wrote on every size, and does so on two sizes of its own.
    first = (list(toy.ENGINES).index(engine) + size) % 2
    chosen = dict(pair for index, pair in enumerate(written.items()) if (index // len(SIZES) + index) % 2 == first)
    by_rank = ranks(size).run(read, engine, [folder for folder, _ in chosen.values()])
    for index, (writer, (_, expected)) in enumerate(chosen.items()):
        actual = toy.whole_tensors([loaded[index] for loaded in by_rank])
        assert actual.keys() == expected.keys(), writer
        for key, value in expected.items():
            assert torch.equal(actual[key], value) and actual[key].dtype == value.dtype, f"{key} of {writer}"


@pytest.mark.slow
def test_what_was_written_is_worth_comparing(written: Written) -> None:
    for _, whole in written.values():
        kinds = {key.split(":")[1] for key in whole}
        assert kinds == {"param", "buffer", "weight_average", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq", "step"}
        assert "model.again.weight:param" not in whole and "model.first.weight:param" in whole
        assert "model.frozen:param" in whole and "model.frozen:exp_avg_slow" not in whole
        assert all(whole[key].abs().sum() > 0 for key in whole if not key.startswith("model.offsets"))
        assert {int(whole[key]) for key in whole if key.endswith(":step")} == {NUM_STEPS}
