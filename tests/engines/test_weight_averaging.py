"""The average of the weights is torch's, evaluations compute with it, and training does not notice."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from support import toy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from anemoi_dist.checkpoint.manifest import AVERAGE
from anemoi_dist.distributed.world import World

DECAY = 0.9
NUM_STEPS = 6
NOT_FINITE = 3
#: ZeRO 3 lets go of small parameters too, and so keeps stale ones where it is not told.
NOT_PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
Whole = dict[str, torch.Tensor]


def build(world: World, engine_name: str, *, precision: str, overlap: bool = False, decay: float | None = DECAY) -> Any:
    name, _, variant = engine_name.partition("-")
    config = toy.make_config(name, precision=precision, weight_averaging={"decay": decay})
    config.engine.overlap = overlap
    if variant:
        config.engine.options = NOT_PERSISTENT
    return toy.build(world, config)


def by_kind(shards: list, kind: str) -> list[torch.Tensor]:
    return [shard.tensor for shard in shards if shard.kind == kind and shard.fqn != "model.frozen"]


def train(
    world: World,
    engine_name: str,
    training: dict[str, Any],
    steps: tuple[int, int] = (0, NUM_STEPS),
    loaded: Whole | None = None,
    evaluates: bool = False,
) -> dict[str, Any]:
    """Train, with a step that is skipped and torch's average beside; evaluate with both weights if asked."""
    engine = build(world, engine_name, **training)
    if loaded is not None:
        engine.load(toy.Whole(loaded), num_updates=steps[0])
    weights = torch.nn.ParameterList(by_kind(toy.clone_shards(engine), "param"))
    averaged = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    result: dict[str, Any] = {"reports": [], "last": [], "averaged": []}
    for step in range(*steps):
        batches = toy.micro_batches(engine.config, world, step)
        if step == NOT_FINITE and world.rank == 0:
            batches[0].fields.fill_(math.nan)
        result["reports"].append(engine.train_step(batches))
        if evaluates and step % 2:
            batch = toy.make_batch(99)
            with engine.averaged_weights():
                result["averaged"].append(engine.evaluate(batch, rollout=1))
                engine.evaluate(batch, rollout=1)
            result["last"].append(engine.evaluate(batch, rollout=1))
        shards = toy.clone_shards(engine)
        for weight, shard in zip(weights, by_kind(shards, "param"), strict=True):
            weight.detach().copy_(shard)
        if step != NOT_FINITE:
            averaged.update_parameters(weights)
    result |= {"shards": shards, "torch": [average.detach() for average in averaged.module]}
    engine.close()
    return result


def forecast(world: World, engine_name: str, training: dict[str, Any], whole: Whole) -> torch.Tensor:
    engine = build(world, engine_name, **training)
    engine.load(toy.Whole(whole), num_updates=NUM_STEPS)
    result = engine.evaluate(toy.make_batch(99), rollout=1)
    engine.close()
    return result


def whole_of(results: list[dict[str, Any]]) -> Whole:
    whole = toy.whole_tensors([result["shards"] for result in results])
    return {key: value for key, value in whole.items() if not key.endswith(":buffer")}  # evaluations count in one


def assert_same(actual: Whole, expected: Whole) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


VARIANTS = [
    *((engine, {"precision": precision}) for engine in toy.ENGINES for precision in ("fp32", "bf16")),
    *((engine, {"precision": "bf16", "overlap": True}) for engine in ("zero1", "zero2", "fsdp2")),
    ("zero3-not_persistent", {"precision": "bf16"}),
]


@pytest.mark.parametrize(("engine", "training"), VARIANTS)
def test_average_evaluation_and_resume(ranks, engine: str, training: dict[str, Any]) -> None:
    straight = ranks(2).run(train, engine, training)
    whole = whole_of(straight)

    assert [report.skipped for report in straight[0]["reports"]] == [step == NOT_FINITE for step in range(NUM_STEPS)]
    for result in straight:
        averages = by_kind(result["shards"], AVERAGE)
        assert len(averages) == len(result["torch"]) > 0
        assert all(map(torch.equal, averages, result["torch"])), "torch's average, bit for bit"
        assert {average.dtype for average in averages} == {torch.float32}

    evaluating = ranks(2).run(train, engine, training, (0, NUM_STEPS), None, True)
    assert_same(whole_of(evaluating), whole)
    assert repr(evaluating[0]["reports"]) == repr(straight[0]["reports"])  # NaN equals itself by its name alone
    averages = {key.replace(f":{AVERAGE}", ":param"): x for key, x in whole.items() if key.endswith(AVERAGE)}
    weights = {key: x for key, x in toy.whole_tensors([r["shards"] for r in straight]).items() if AVERAGE not in key}
    for kind, loaded in (("last", weights), ("averaged", weights | averages)):
        for result, expected in zip(evaluating, ranks(2).run(forecast, engine, training, loaded), strict=True):
            assert torch.equal(result[kind][-1], expected), kind
    assert not torch.equal(evaluating[0]["last"][-1], evaluating[0]["averaged"][-1])

    half = ranks(2).run(train, engine, training, (0, NUM_STEPS // 2))
    saved = toy.whole_tensors([result["shards"] for result in half])
    assert_same(whole_of(ranks(2).run(train, engine, training, (NUM_STEPS // 2, NUM_STEPS), saved)), whole)


def load(world: World, decay: float | None, whole: Whole) -> tuple[list, list[str]]:
    engine = build(world, "zero2", precision="bf16", decay=decay)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load(toy.Whole(whole), num_updates=NUM_STEPS)
    shards = toy.clone_shards(engine)
    engine.close()
    return shards, [str(w.message) for w in caught if "averaged" in str(w.message)]


def test_a_checkpoint_without_averages(ranks) -> None:
    whole = toy.whole_tensors([r["shards"] for r in ranks(2).run(train, "zero2", {"precision": "bf16"})])
    for shards, notes in ranks(2).run(load, DECAY, {key: x for key, x in whole.items() if AVERAGE not in key}):
        assert all(map(torch.equal, by_kind(shards, AVERAGE), by_kind(shards, "param"))) and by_kind(shards, AVERAGE)
        assert notes == ["the checkpoint has no averaged weights: the average starts from its weights"]
    for shards, notes in ranks(2).run(load, None, whole):
        assert not by_kind(shards, AVERAGE)
        assert notes == ["the averaged weights of the checkpoint are left out (training.weight_averaging.decay)"]
    assert not any(notes for _, notes in ranks(2).run(load, DECAY, whole))
