"""Ranks that share a sample and a model compute what one rank computes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import toy
from support.anemoi_configs import packaged_configs
from support.anemoi_sample import overrides
from support.saving import save

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.anemoi.composition import compose_anemoi
from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.schema import Config, TaskConfig
from anemoi_dist.config.tree import Tree, place
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler
from anemoi_dist.distributed.world import World, seed_step
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.tasks import create_task

NUM_STEPS = 3
TOLERANCE = 1e-5
#: Every sixth row and column of the sample.
_THINNING = 6
_GRID = 312
_SHARDED = {"model.keep_batch_sharded": True}
#: What a decoder starts from, where the grid is whole again: anemoi-models divides encoded data twice.
_WHOLE = {
    "model.keep_batch_sharded": False,
    "model.decoders.0.target_node_features": ["prognostics", "forcings", "trainable_parameters"],
}


@functools.cache
def composed() -> Tree:
    arguments = [argument for argument in overrides(Path("unused"), ranks=1) if not argument.startswith("hydra")]
    settings = compose_anemoi(TaskConfig(config=str(packaged_configs()), overrides=arguments), hardware={})[0]
    for split in ("training", "validation"):
        place(settings, f"dataloader.{split}.datasets.data.dataset_config.thinning", _THINNING)
    place(settings, "graph.nodes.data.node_builder.dataset.thinning", _THINNING)
    return settings


def make_config(engine: str, *, model: int = 1, reader: int = 1, keys: Tree) -> Config:
    config = toy.make_config(engine, global_batch_size=2, micro_batch_size=1)
    settings = copy.deepcopy(composed())
    groups = {"system.hardware.num_gpus_per_model": model, "dataloader.read_group_size": reader}
    for key, value in {**groups, **keys}.items():
        place(settings, key, value)
    config.task = TaskConfig(kind="anemoi", settings=settings, steps_per_epoch=10)
    config.run.seed, config.validation.max_samples = 1, 3
    return config


def train(
    world: World, config: Config, steps: tuple[int, int] = (0, NUM_STEPS), begin: str = "", end: str = ""
) -> dict[str, Any]:
    """Train on this rank, from the checkpoint in ``begin``, and save in ``end``."""
    torch.manual_seed(config.run.seed)
    task, groups = create_task(config), config.task.groups
    module = task.create_module(world_size=world.world_size // groups.sample)
    engine = create_engine(module, config=config, world=world)
    if begin:
        engine.load(Checkpoint(LocalStore(Path(begin)), steps[0]), num_updates=steps[0])
    samples, plan = task.samples("train"), plan_batches(config, world_size=world.world_size)
    sampler = MicroBatchSampler(GlobalSampleOrder(len(samples), seed=0), plan=plan, rank=world.rank)
    reports = []
    for step in range(*steps):
        seed_step(1, step=step, rank=world.rank // groups.model)
        shares = [sampler.samples(step, micro) for micro in range(plan.accumulation)]
        batches = [task.collate([samples.read(index, step=step) for index in share]) for share in shares]
        reports.append(engine.train_step(batches))
    evaluation = task.evaluate("validation", evaluate=engine.evaluate, world=world)
    if end:
        save(LocalStore(Path(end)), engine.shards(), world=world, step=steps[1])
    result = {
        "losses": [report.loss for report in reports],
        "norms": [report.grad_norm for report in reports],
        "scores": list(evaluation.metrics.values()),
        "grid": batches[0].fields["data"].shape[-2],
        "shards": toy.clone_shards(engine),
    }
    engine.close()
    return result


@pytest.fixture(scope="module")
def trained(ranks):
    """Return ``trained(engine, num_ranks, ...)``: the results of all ranks, each computed once."""
    known: dict[str, list[dict]] = {}

    def get(engine: str, num_ranks: int, **groups: Any) -> list[dict]:
        key = repr((engine, num_ranks, groups))
        if key not in known:
            known[key] = ranks(num_ranks).run(train, make_config(engine, **groups))
        return known[key]

    return get


def parameters(results: list[dict]) -> torch.Tensor:
    whole = toy.whole_tensors([result["shards"] for result in results])
    return torch.cat([whole[key].double().view(-1) for key in sorted(whole) if key.endswith(":param")])


def assert_same(results: list[dict], expected: list[dict], *, steps: slice = slice(None)) -> None:
    for name in ("losses", "norms"):
        assert results[0][name] == pytest.approx(expected[0][name][steps], rel=TOLERANCE), name
    assert results[0]["scores"] == pytest.approx(expected[0]["scores"], rel=TOLERANCE)
    for other in results[1:]:
        assert all(other[name] == results[0][name] for name in ("losses", "norms", "scores"))
    ours, theirs = parameters(results), parameters(expected)
    assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("reader", "keys"), [(2, _SHARDED), (1, _WHOLE), (2, _WHOLE)], ids=["kept sharded", "read whole", "gathered"]
)
def test_groups_of_two_compute_what_one_rank_computes(trained, engine, reader, keys):
    results = trained(engine, 4, model=2, reader=reader, keys=keys)
    assert {result["grid"] for result in results} == {_GRID // reader}
    for num_ranks in (1, 2):
        assert_same(results, trained("ddp", num_ranks, keys=keys))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("zero3", "fsdp2"), ("fsdp2", "zero2")])
def test_a_run_goes_on_with_other_groups(trained, ranks, tmp_path, first, second):
    grouped = make_config(first, model=2, reader=2, keys=_SHARDED)
    ranks(4).run(train, grouped, (0, 2), "", str(tmp_path))
    results = ranks(2).run(train, make_config(second, keys=_SHARDED), (2, NUM_STEPS), str(tmp_path))
    assert_same(results, trained("ddp", 1, keys=_SHARDED), steps=slice(2, None))
