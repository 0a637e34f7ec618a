"""The one suite that every engine passes, on 1, 2 and 4 ranks: it is AdEMAMix on the full batch, only spread out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import toy

from anemoi_dist.data.batch import Batch
from anemoi_dist.world import World

NUM_STEPS = 20
EMAS = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
#: Relative difference of all parameters (as one vector) to the single fp32 process after 20 steps.
TOLERANCE = {"fp32": 1e-6, "bf16": 4e-2}
WORLD_SIZES = (1, 2, 4)


def train(world: World, engine_name: str, training: dict[str, Any], poisoned: dict[int, int] | None = None) -> dict:
    """Train on this rank; ``poisoned`` maps a step to the rank whose loss becomes NaN there."""
    config = toy.make_config(engine_name, **training)
    engine = toy.build(world, config)
    reports, before, memory_at_start = [], None, engine.memory()
    for step in range(NUM_STEPS):
        batches = toy.micro_batches(config, world, step)
        if poisoned and poisoned.get(step) == world.rank:
            batches[0] = Batch(torch.full_like(batches[0].fields, math.nan), batches[0].dates)
        if poisoned and step in poisoned:
            before = toy.clone_shards(engine)
        reports.append(engine.train_step(batches))
        if poisoned and step in poisoned:
            after = {(s.fqn, s.kind): s.tensor for s in toy.clone_shards(engine) if s.kind != "buffer"}
            for shard in before:
                if shard.kind != "buffer":
                    assert torch.equal(after[shard.fqn, shard.kind], shard.tensor), f"{shard.fqn} {shard.kind}"
    prediction = engine.predict(toy.make_batch(99, rollout=2), rollout=2)
    result = {
        "shards": toy.clone_shards(engine),
        "reports": reports,
        "memory": engine.memory(),
        "memory_at_start": memory_at_start,
        "schedule": engine.schedule_values(),
        "prediction": prediction,
    }
    engine.close()
    return result


@pytest.fixture(scope="module")
def trained(ranks) -> Callable[[str, int, str], list[dict]]:
    """Return ``trained(engine, num_ranks, precision)``: every rank's result, trained once for all tests."""
    results: dict[tuple[str, int, str], list[dict]] = {}

    def get(engine: str, num_ranks: int, precision: str) -> list[dict]:
        key = (engine, num_ranks, precision)
        if key not in results:
            results[key] = ranks(num_ranks).run(train, engine, {"precision": precision})
        return results[key]

    return get


def relative(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> float:
    keys = [key for key in expected if key.endswith(f":{kind}")]
    difference = sum(float((actual[key].double() - expected[key].double()).square().sum()) for key in keys)
    return math.sqrt(difference / sum(float(expected[key].double().square().sum()) for key in keys))


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    return toy.reference(toy.make_config("ddp"), NUM_STEPS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_equals_a_single_process(trained, expected, engine: str, num_ranks: int, precision: str) -> None:
    results = trained(engine, num_ranks, precision)
    values, losses, norms = expected
    whole = toy.whole_tensors([result["shards"] for result in results])
    tolerance = TOLERANCE[precision]

    assert relative(whole, values, "param") < tolerance
    for kind in EMAS:
        assert relative(whole, values, kind) < (2e-5 if precision == "fp32" else 0.2)
    for result in results:
        assert [r.loss for r in result["reports"]] == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 0.05)
        assert [r.grad_norm for r in result["reports"]] == pytest.approx(
            norms, rel=1e-4 if precision == "fp32" else 0.1
        )
        assert not any(r.skipped for r in result["reports"])
    assert {int(whole[key]) for key in whole if key.endswith(":step")} == {NUM_STEPS}
    assert torch.equal(whole["model.frozen:param"], values["model.frozen:param"])
    for other in results[1:]:
        assert torch.equal(other["prediction"], results[0]["prediction"])


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_states_are_partitioned(trained, engine: str, num_ranks: int) -> None:
    results = trained(engine, num_ranks, "fp32")
    module = toy.make_module(toy.make_config(engine))
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    total = sum(trained)
    for rank, result in enumerate(results):
        memory = result["memory"]
        assert memory == result["memory_at_start"], "states are allocated before the first step"
        for kind in EMAS:
            saved = sum(s.tensor.numel() for s in result["shards"] if s.kind == kind)
            if engine not in toy.SHARDED:
                assert memory.states[kind] == 4 * total
            elif engine == "fsdp2":  # rows are not cut: a rank holds at most one chunk of rows of each tensor
                assert memory.states[kind] == 4 * saved
                assert saved <= sum(
                    -(-p.shape[0] // num_ranks) * (p.numel() // p.shape[0])
                    for p in module.parameters()
                    if p.requires_grad
                )
            else:
                padding = num_ranks * len(trained)
                assert total / num_ranks <= memory.states[kind] / 4 <= total / num_ranks + padding, (rank, kind)
    for kind in EMAS:
        assert sum(s.tensor.numel() for r in results for s in r["shards"] if s.kind == kind) == total


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_accumulation_clipping_and_rollout(ranks, engine: str) -> None:
    training = {"micro_batch_size": 1, "clip_grad_norm": 0.05, "rollout": 2}
    values, losses, norms = toy.reference(toy.make_config("ddp", **training), NUM_STEPS)
    assert max(norms) > 0.05, "clipping must have something to do"
    results = ranks(2).run(train, engine, training)
    whole = toy.whole_tensors([result["shards"] for result in results])
    assert relative(whole, values, "param") < TOLERANCE["fp32"]
    assert [r.grad_norm for r in results[0]["reports"]] == pytest.approx(norms, rel=1e-4)
    assert [r.loss for r in results[1]["reports"]] == pytest.approx(losses, rel=1e-5)
    assert {int(whole[key]) for key in whole if key.endswith(":step")} == {NUM_STEPS}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_nan_on_one_rank_skips_on_all(ranks, engine: str, precision: str) -> None:
    training = {"precision": precision, "micro_batch_size": 2}
    results = ranks(2).run(train, engine, training, {3: 1, 9: 0})
    for result in results:
        assert [step for step, r in enumerate(result["reports"]) if r.skipped] == [3, 9]
        assert all(math.isfinite(r.loss) for step, r in enumerate(result["reports"]) if step not in (3, 9))
    whole = toy.whole_tensors([result["shards"] for result in results])
    assert {int(whole[key]) for key in whole if key.endswith(":step")} == {NUM_STEPS - 2}
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_schedules_follow_optimizer_steps(ranks, engine: str) -> None:
    (result, _) = ranks(2).run(train, engine, {"micro_batch_size": 1})
    assert result["schedule"]["alpha"] == pytest.approx(5.0 * NUM_STEPS / 30)
    assert 0.9 < result["schedule"]["beta3"] < 0.9999
    rates = [report.lr for report in result["reports"]]
    assert rates[0] == pytest.approx(0.02 / 4) and rates[3] == pytest.approx(0.02, rel=0.02)
    assert rates[-1] < rates[4]
