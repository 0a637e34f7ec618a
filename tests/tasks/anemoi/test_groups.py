"""Ranks that share a sample and a model compute what one rank computes, and what anemoi-training's groups compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import toy
from support.anemoi import ENSEMBLE, SMALL_GAPS, compose_small, steps_of, train_ours, train_theirs
from support.saving import save

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.tasks import create_task

NUM_STEPS = 3
NUM_POINTS = 9 * 18
TOLERANCE = 1e-5
SMALL = (
    SMALL_GAPS,
    "graph.nodes.hidden.node_builder.resolution=1",
    "model.processor.num_layers=2",
    "training.optimization.lr_scheduler.warmup_t=0",
    # Else Adam makes whole updates of rounding, where a gradient is zero (the bias of attention's keys).
    "+training.optimization.optimizer.eps=1e-5",
    f"training.max_steps={NUM_STEPS}",
    "dataloader.limit_batches.training=20",
)
#: One epoch of these steps, at whose end theirs validates.
EPOCH = ("training.accum_grad_batches=1", f"dataloader.limit_batches.training={NUM_STEPS}")
#: Two ranks of one ensemble.
PAIR = (f"training.max_steps={NUM_STEPS}", "system.hardware.num_gpus_per_ensemble=2", *EPOCH)
KEPT = ("model.keep_batch_sharded=true",)
#: The grid is whole where the model begins and ends.
WHOLE = (
    "model=graphtransformer",
    "model.processor.num_chunks=2",
    "model.keep_batch_sharded=false",
    *(
        f"model.{part}.{key}"
        for part in ("encoders.0.mapper", "processor", "decoders.0.mapper")
        for key in ("num_heads=2", "graph_attention_backend=pyg")
    ),
)


def make_config(root: Path, engine: str, ranks: int, *overrides: str, model: int = 1, reader: int = 1) -> Config:
    """Return a configuration of two samples a step, whatever the ranks."""
    groups = (f"system.hardware.num_gpus_per_model={model}", f"dataloader.read_group_size={reader}")
    number = ranks // model
    # Theirs multiplies the rate by the number of groups.
    steps = (f"training.accum_grad_batches={2 // number}", f"training.optimization.lr={2e-3 / number}")
    ours = (f"engine={engine}",)
    return compose_small("config", *SMALL, *groups, *steps, *overrides, root=root, ranks=ranks, ours=ours)


def train(world: World, config: Config, start: int = 0, begin: str = "", stop: int = NUM_STEPS, end: str = "") -> dict:
    """Train on this rank, from the checkpoint in ``begin``, and save in ``end``."""
    task = create_task(config)
    module = task.create_module(world_size=world.world_size // config.task.groups.sample)
    engine = create_engine(module, config=config, world=world)
    if begin:
        engine.load(Checkpoint(LocalStore(Path(begin)).path(start)), num_updates=start)
    reports, points = [], 0
    for step, batches in steps_of(task, config, world, start=start):
        if step < stop:
            points = batches[0].fields["data"].shape[-2]
            reports.append(engine.train_step(batches))
    evaluation = task.evaluate("validation", evaluate=engine.evaluate, world=world)
    if end:
        save(LocalStore(Path(end)), engine.shards(), world=world, step=stop)
    result = {
        "losses": [report.loss for report in reports],
        "norms": [report.grad_norm for report in reports],
        "scores": list(evaluation.metrics.values()),
        "points": points,
        "shards": toy.clone_shards(engine),
    }
    engine.close()
    return result


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """Return ``trained(engine, num_ranks, ...)``: the results of all ranks, each computed once."""
    known: dict[str, list[dict]] = {}
    root = tmp_path_factory.mktemp("small")

    def get(*arguments: Any, **groups: Any) -> list[dict]:
        key = repr((arguments, groups))
        if key not in known:
            known[key] = ranks(arguments[1]).run(train, make_config(root, *arguments, **groups))
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
@pytest.mark.parametrize(
    ("engine", "reader", "overrides"),
    [
        *(pytest.param(engine, 2, KEPT, id=f"{engine} kept sharded") for engine in ("ddp", "zero2", "zero3", "fsdp2")),
        pytest.param("zero2", 1, WHOLE, id="zero2 read whole"),
        pytest.param("fsdp2", 2, WHOLE, id="fsdp2 gathered"),
    ],
)
def test_groups_of_two_compute_what_one_rank_computes(trained, engine, reader, overrides):
    results = trained(engine, 4, *overrides, model=2, reader=reader)
    assert {result["points"] for result in results} == {NUM_POINTS // reader}
    for num_ranks in (1, 2):
        assert_same(results, trained("ddp", num_ranks, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("zero3", "fsdp2"), ("fsdp2", "zero2")])
def test_a_run_goes_on_with_other_groups(trained, ranks, tmp_path, first, second):
    grouped = make_config(tmp_path, first, 4, *KEPT, model=2, reader=2)
    ranks(4).run(train, grouped, 0, "", 2, str(tmp_path))
    results = ranks(2).run(train, make_config(tmp_path, second, 2, *KEPT), 2, str(tmp_path))
    assert_same(results, trained("ddp", 1, *KEPT), steps=slice(2, None))


@pytest.mark.parametrize("row", ["model", pytest.param("ensemble", marks=pytest.mark.slow)])
def test_as_in_their_groups(ranks, tmp_path, row):
    if row == "model":
        config = make_config(tmp_path, "zero2", 2, *KEPT, *EPOCH, model=2, reader=2)
    else:
        config = compose_small("ensemble_crps", *ENSEMBLE, *PAIR, root=tmp_path, ranks=2)
    assert config.task.groups.sample == 2 and config.training.global_batch_size == 1
    ours, theirs = ranks(2).run(train_ours, config), ranks(2).run(train_theirs, config)
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=TOLERANCE)
    assert ours[0]["metrics"]["loss"] == pytest.approx(theirs[0]["metrics"]["val_multi_dataset_loss"], rel=TOLERANCE)
    for name, parameter in theirs[0]["parameters"].items():
        torch.testing.assert_close(ours[0]["parameters"][name], parameter, rtol=1e-4, atol=1e-6)
