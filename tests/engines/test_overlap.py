"""``engine.overlap``: another order of work, and not one bit of difference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import toy
from torch.distributed.fsdp import FSDPModule

from anemoi_dist.distributed.world import World
from anemoi_dist.engines import zero
from anemoi_dist.errors import ConfigError

NUM_STEPS = 6
LIMIT = 0.05


def build(world: World, engine_name: str, *, overlap: bool, **training: Any) -> Any:
    """Return an engine whose partitions are cut into several buckets, small as the model is."""
    config = toy.make_config(engine_name, **training)
    config.engine.overlap = overlap
    before, zero.BUCKET_NUMEL = zero.BUCKET_NUMEL, 16
    try:
        return toy.build(world, config)
    finally:
        zero.BUCKET_NUMEL = before


def train(
    world: World,
    engine_name: str,
    overlap: bool,
    training: dict[str, Any],
    steps: tuple[int, int] = (0, NUM_STEPS),
    loaded: dict[str, torch.Tensor] | None = None,
    not_finite: int | None = None,
) -> tuple[list, list, int]:
    engine = build(world, engine_name, overlap=overlap, **training)
    if loaded is not None:
        engine.load(toy.Whole(loaded), num_updates=steps[0])
    reports = []
    for step in range(*steps):
        batches = toy.micro_batches(engine.config, world, step)
        if step == not_finite and world.rank == 1:
            batches[0].fields[0, 0] = math.inf
        reports.append(engine.train_step(batches))
    num_buckets = len(engine._ahead) + 1 if engine_name == "fsdp2" else len(engine._buckets)
    shards = toy.clone_shards(engine)
    engine.close()
    return shards, reports, num_buckets


@pytest.mark.parametrize(
    ("engine", "num_ranks", "precision", "optimizer"),
    [
        pytest.param(
            engine,
            num_ranks,
            precision,
            optimizer,
            marks=[pytest.mark.slow] if num_ranks == 4 and (precision, optimizer) != ("bf16", None) else [],
        )
        for engine, num_ranks in (("zero1", 2), ("zero2", 2), ("zero2", 4), ("fsdp2", 2), ("fsdp2", 4))
        for precision in ("fp32", "bf16")
        for optimizer in (None, "torch.optim.AdamW")
    ]
    + [(engine, 2, "bf16", "by value") for engine in ("zero1", "zero2", "fsdp2")],
)
def test_equal_bit_for_bit(ranks, engine: str, num_ranks: int, precision: str, optimizer: str | None) -> None:
    training: dict[str, Any] = {"precision": precision, "clip_grad_norm": LIMIT, "micro_batch_size": 1}
    if optimizer == "by value":
        training |= {"clip_grad_norm": None, "clip_grad_value": LIMIT / 10}
    elif optimizer:
        training["optimizer"] = {"_target_": optimizer}
    without = ranks(num_ranks).run(train, engine, False, training)
    with_overlap = ranks(num_ranks).run(train, engine, True, training)
    assert without[0][2] == 1 and with_overlap[0][2] > 2
    assert max(report.grad_norm for report in without[0][1]) > LIMIT, "clipping must have something to do"
    for a, b in zip(without, with_overlap, strict=True):
        assert a[1] == b[1]
    expected, got = (toy.whole_tensors([result[0] for result in each]) for each in (without, with_overlap))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_a_gradient_that_is_not_finite_is_skipped(ranks, engine: str) -> None:
    training: dict[str, Any] = {"clip_grad_norm": LIMIT, "micro_batch_size": 1}
    each = [ranks(2).run(train, engine, overlap, training, (0, NUM_STEPS), None, 3) for overlap in (False, True)]
    for _, reports, _ in (*each[0], *each[1]):
        assert [report.skipped for report in reports] == [False, False, False, True, False, False]
    expected, got = (toy.whole_tensors([result[0] for result in results]) for results in each)
    for key, value in expected.items():
        assert value.isfinite().all() and torch.equal(got[key], value), key


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_a_run_goes_on_with_it_bit_for_bit(ranks, engine: str) -> None:
    training = {"clip_grad_norm": LIMIT}
    whole = [
        toy.whole_tensors([shards for shards, *_ in ranks(2).run(train, engine, overlap, training, steps, loaded)])
        for overlap, steps, loaded in ((False, (0, NUM_STEPS), None), (False, (0, 3), None))
    ]
    resumed = ranks(2).run(train, engine, True, training, (3, NUM_STEPS), whole[1])
    for key, value in toy.whole_tensors([shards for shards, *_ in resumed]).items():
        assert torch.equal(value, whole[0][key]), key


def refused(world: World, engine_name: str) -> str:
    config = toy.make_config(engine_name, optimizer={"_target_": "pytorch_optimizer.AdEMAMix"})
    config.engine.overlap, config.security.allowed_targets = True, ["support.toy", "pytorch_optimizer"]
    try:
        toy.build(world, config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_an_optimizer_that_may_count_the_parts_as_steps_is_refused(ranks, engine: str) -> None:
    for said in ranks(2).run(refused, engine):
        assert "engine.overlap=True: steps a part of the parameters at a time, and pytorch_optimizer." in said


def watch(world: World, overlap: bool) -> tuple[list[str], int, int]:
    """Return in which order one step steps and gathers, and how many gradients were squared before it, of how many."""
    engine = build(world, "zero2", overlap=overlap, micro_batch_size=2)
    order: list[str] = []
    engine.optimizer.register_step_pre_hook(lambda *_: order.append("step"))
    original = dist.broadcast
    squared, update = [], engine._update

    def counted() -> tuple[float, bool]:
        squared.append((len(engine._gradients._squares), len(engine._gradients._arrived)))
        return update()

    def recorded(part: torch.Tensor, src: int, async_op: bool = False) -> Any:
        if async_op:  # what is awaited at once is no parameter
            order.append(f"from {src}")
        return original(part, src=src, async_op=async_op)

    engine._update = counted
    dist.broadcast = recorded
    try:
        engine.train_step(toy.micro_batches(engine.config, world, 0))
    finally:
        dist.broadcast = original
    engine.close()
    return order, *squared[0]


def test_a_bucket_is_gathered_before_the_next_is_stepped(ranks) -> None:
    order, num_squared, num_arrived = ranks(2).run(watch, True)[0]
    assert len(order) > 6
    assert order == ["step", "from 0", "from 1"] * (len(order) // 3)
    assert num_squared == num_arrived > 0, "the norm is ready when the step begins"


def test_without_it_all_is_stepped_at_once(ranks) -> None:
    order, num_squared, num_arrived = ranks(2).run(watch, False)[0]
    assert order == ["step", "from 0", "from 1"]
    assert num_squared == 0 < num_arrived


def gather_ahead(world: World) -> dict[str, Any]:
    """Return what a step of FSDP2 steps and gathers, in order, and whether a load is seen after one."""
    engine = build(world, "fsdp2", overlap=True, micro_batch_size=2)
    order: list[str] = []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    engine.optimizer.register_step_pre_hook(
        lambda optimizer, *_: order.append(" ".join(names[id(p)] for g in optimizer.param_groups for p in g["params"]))
    )
    unshard, update, num_squared = FSDPModule.unshard, engine._update, []

    def recorded(module: FSDPModule, async_op: bool = False) -> Any:
        order.append("gather")
        return unshard(module, async_op=async_op)

    def counted() -> tuple[float, bool]:
        num_squared.append(len(engine._squares))
        return update()

    engine._update, FSDPModule.unshard = counted, recorded
    try:
        engine.train_step(toy.micro_batches(engine.config, world, 0))
    finally:
        FSDPModule.unshard = unshard
    first_order = list(order)
    saved: list[Any] = [None] * world.world_size
    dist.all_gather_object(saved, toy.clone_shards(engine))
    batch = toy.micro_batches(engine.config, world, 1)[0]
    forecast = engine.evaluate(batch, rollout=1)
    engine.train_step(toy.micro_batches(engine.config, world, 1))
    engine.load(toy.Whole(toy.whole_tensors(saved)), num_updates=1)  # makes stale what that step began to gather
    is_same = torch.equal(engine.evaluate(batch, rollout=1), forecast)
    engine.close()
    return {"order": first_order, "num_squared": num_squared[0], "is_same": is_same}


def test_fsdp2_steps_first_what_the_forward_pass_needs_first(ranks) -> None:
    for seen in ranks(2).run(gather_ahead):
        assert seen["order"] == [
            "model.gain model.head.weight model.head.bias",
            "gather",
            "model.blocks.0.weight model.blocks.0.bias",
            "gather",
            "model.blocks.1.weight model.blocks.1.bias model.blocks.2.weight model.blocks.2.bias",
        ]
        assert seen["num_squared"] == 9, "the norm is ready when the step begins"
        assert seen["is_same"]
