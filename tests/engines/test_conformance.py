"""The one suite that every engine passes, on 1, 2 and 4 ranks: it is AdEMAMix on the full batch, only spread out."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import toy
from support.saving import ORIGIN, save

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.data.batch import Batch
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import Engine
from anemoi_dist.optimizers.rounding import ElementRange

NUM_STEPS = 20
#: Of the runs with an update that is skipped, and with many micro-batches a step.
NUM_SHORT_STEPS = 12
EMAS = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
#: Relative difference of all parameters (as one vector) to the single fp32 process after 20 steps.
TOLERANCE = {"fp32": 1e-6, "bf16": 4e-2}
WORLD_SIZES = (1, 2, 4)
ACCUMULATING = {"micro_batch_size": 1, "clip_grad_norm": 0.05, "rollout": 2}
Trained = Callable[..., list[dict]]


def train(
    world: World,
    engine_name: str,
    training: dict[str, Any],
    num_steps: int = NUM_STEPS,
    poisoned: dict[int, int] | None = None,
) -> dict:
    """Train on this rank; ``poisoned`` maps a step to the rank whose loss becomes NaN there."""
    config = toy.make_config(engine_name, **training)
    engine = toy.build(world, config)
    reports, before, memory_at_start = [], None, engine.memory()
    for step in range(num_steps):
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
    prediction = engine.evaluate(toy.make_batch(99, rollout=2), rollout=2)
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
def trained(ranks) -> Trained:
    """Return ``trained(engine, num_ranks, training, num_steps)``: every rank's result, trained once for all tests."""
    results: dict[str, list[dict]] = {}

    def get(engine: str, num_ranks: int, training: dict[str, Any], num_steps: int = NUM_STEPS) -> list[dict]:
        key = repr((engine, num_ranks, training, num_steps))
        if key not in results:
            results[key] = ranks(num_ranks).run(train, engine, training, num_steps)
        return results[key]

    return get


def relative(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> float:
    keys = [key for key in expected if key.endswith(f":{kind}")]
    difference = sum(float((actual[key].double() - expected[key].double()).square().sum()) for key in keys)
    return math.sqrt(difference / sum(float(expected[key].double().square().sum()) for key in keys))


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    return toy.reference(toy.make_config("ddp"), NUM_STEPS)


@pytest.fixture(scope="module")
def expected_accumulating() -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    return toy.reference(toy.make_config("ddp", **ACCUMULATING), NUM_SHORT_STEPS)


@pytest.mark.parametrize(
    ("num_ranks", "precision"),
    [
        *((num_ranks, "fp32") for num_ranks in WORLD_SIZES),
        (1, "bf16"),
        (2, "bf16"),
        pytest.param(4, "bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_equals_a_single_process(trained: Trained, expected, engine: str, num_ranks: int, precision: str) -> None:
    results = trained(engine, num_ranks, {"precision": precision})
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
def test_states_are_partitioned(trained: Trained, engine: str, num_ranks: int) -> None:
    results = trained(engine, num_ranks, {"precision": "fp32"})
    module = toy.make_module(toy.make_config(engine))
    sizes = [p.numel() for p in module.parameters() if p.requires_grad]
    total = sum(sizes)
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
                padding = num_ranks * len(sizes)
                assert total / num_ranks <= memory.states[kind] / 4 <= total / num_ranks + padding, (rank, kind)
    for kind in EMAS:
        assert sum(s.tensor.numel() for r in results for s in r["shards"] if s.kind == kind) == total


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_accumulation_clipping_and_rollout(trained: Trained, expected_accumulating, engine: str) -> None:
    values, losses, norms = expected_accumulating
    assert max(norms) > 0.05, "clipping must have something to do"
    results = trained(engine, 2, ACCUMULATING, NUM_SHORT_STEPS)
    whole = toy.whole_tensors([result["shards"] for result in results])
    assert relative(whole, values, "param") < TOLERANCE["fp32"]
    assert [r.grad_norm for r in results[0]["reports"]] == pytest.approx(norms, rel=1e-4)
    assert [r.loss for r in results[1]["reports"]] == pytest.approx(losses, rel=1e-5)
    assert {int(whole[key]) for key in whole if key.endswith(":step")} == {NUM_SHORT_STEPS}


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_schedules_follow_optimizer_steps(trained: Trained, engine: str) -> None:
    (result, _) = trained(engine, 2, ACCUMULATING, NUM_SHORT_STEPS)
    assert result["schedule"]["alpha"] == pytest.approx(5.0 * NUM_SHORT_STEPS / 30)
    assert 0.9 < result["schedule"]["beta3"] < 0.9999
    rates = [report.lr for report in result["reports"]]
    assert rates[0] == pytest.approx(0.02 / 4) and rates[3] == pytest.approx(0.02, rel=0.02)
    assert rates[-1] < rates[4]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_nan_on_one_rank_skips_on_all(ranks, engine: str, precision: str) -> None:
    training = {"precision": precision, "micro_batch_size": 2}
    results = ranks(2).run(train, engine, training, NUM_SHORT_STEPS, {3: 1, 9: 0})
    for result in results:
        assert [step for step, r in enumerate(result["reports"]) if r.skipped] == [3, 9]
        assert all(math.isfinite(r.loss) for step, r in enumerate(result["reports"]) if step not in (3, 9))
    whole = toy.whole_tensors([result["shards"] for result in results])
    assert {int(whole[key]) for key in whole if key.endswith(":step")} == {NUM_SHORT_STEPS - 2}
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())


# States in bfloat16

NUM_SAVED, NUM_IN_ALL = 3, 6
ALL_NARROW = dict.fromkeys(EMAS, "bf16")


def gradient_of(name: str, numel: int, step: int) -> torch.Tensor:
    """A gradient that no engine has reduced: the same bits on any number of ranks."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + step))


def narrow_config(engine: str, state_dtype: Any) -> Any:
    optimizer = toy.make_config(engine).training.optimizer
    return toy.make_config(engine, optimizer={**optimizer, "state_dtype": state_dtype})


def step_with_given_gradients(world: World, engine: Engine, config: Any, steps: range) -> None:
    """Take steps with :func:`gradient_of` in the place of what the engine has reduced."""
    step = steps.start

    def replace(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        for shard in engine.local_shards():  # type: ignore[attr-defined]
            if (gradient := stepped.get(shard.owner)) is not None:
                whole = gradient_of(shard.fqn, math.prod(shard.global_shape), step)
                shard.view(gradient).copy_(whole[shard.start : shard.start + shard.numel])

    hook = engine.optimizer.register_step_pre_hook(replace)  # type: ignore[attr-defined]
    for step in steps:
        engine.train_step(toy.micro_batches(config, world, step))
    hook.remove()


def save_narrow(world: World, folder: Path) -> None:
    config = narrow_config("zero2", ALL_NARROW)
    engine = toy.build(world, config)
    step_with_given_gradients(world, engine, config, range(NUM_SAVED))
    save(LocalStore(folder), engine.shards(), world=world, step=NUM_SAVED, samples_seen=0, trainer={}, origin=ORIGIN)
    engine.close()


def resume_narrow(world: World, engine_name: str, folder: Path, state_dtype: Any, num_in_all: int = NUM_IN_ALL) -> dict:
    config = narrow_config(engine_name, state_dtype)
    engine = toy.build(world, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load(Checkpoint(folder / f"step-{NUM_SAVED:08d}"), num_updates=NUM_SAVED)
    loaded = toy.clone_shards(engine)
    step_with_given_gradients(world, engine, config, range(NUM_SAVED, num_in_all))
    result = {"loaded": loaded, "shards": toy.clone_shards(engine), "memory": engine.memory()}
    engine.close()
    return {**result, "notes": [str(w.message) for w in caught if "state_dtype" in str(w.message)]}


@pytest.fixture(scope="module")
def saved_narrow(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow")
    ranks(2).run(save_narrow, folder)
    return folder


@pytest.fixture(scope="module")
def narrow_alone() -> dict[str, torch.Tensor]:
    """Parameters and states after all steps of one process without an engine, and without a pause."""
    from anemoi_dist.optimizers.learning_rate import set_num_updates

    config = narrow_config("ddp", ALL_NARROW)
    module = toy.make_module(config)
    created = module.configure_optimizers()
    optimizer, scheduler = created["optimizer"], created["lr_scheduler"]["scheduler"]
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        optimizer.set_element_ranges(p, [ElementRange(name, 0, 0, p.numel())], seed=config.run.seed)
    for step in range(NUM_IN_ALL):
        set_num_updates(scheduler, step)
        for name, p in trained.items():
            p.grad = gradient_of(name, p.numel(), step).view_as(p)
        optimizer.step()
    values = {f"{name}:param": p.detach() for name, p in trained.items()}
    return values | {f"{name}:{kind}": optimizer.state[p][kind] for name, p in trained.items() for kind in EMAS}


@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [(engine, 2) for engine in toy.ENGINES]
    + [("zero2", 4), ("zero3", 4), ("fsdp2", 4)]
    + [pytest.param(engine, 1, marks=pytest.mark.slow) for engine in toy.ENGINES]
    + [pytest.param(engine, 4, marks=pytest.mark.slow) for engine in ("ddp", "zero0", "zero1", "zero3_offload")],
)
def test_rounding_depends_neither_on_engine_nor_on_ranks(
    ranks, saved_narrow: Path, narrow_alone, engine: str, num_ranks: int
) -> None:
    results = ranks(num_ranks).run(resume_narrow, engine, saved_narrow, ALL_NARROW)
    whole = toy.whole_tensors([result["shards"] for result in results])
    for key, value in narrow_alone.items():
        assert whole[key].dtype == value.dtype and torch.equal(whole[key], value), key
    assert not any(result["notes"] for result in results)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_states_of_another_type_are_converted_and_said(ranks, saved_narrow: Path, engine: str) -> None:
    results = ranks(2).run(resume_narrow, engine, saved_narrow, "bf16", NUM_SAVED)
    loaded = toy.whole_tensors([result["loaded"] for result in results])
    narrow = ranks(2).run(resume_narrow, engine, saved_narrow, ALL_NARROW, NUM_SAVED)
    same = toy.whole_tensors([result["loaded"] for result in narrow])
    assert {loaded[key].dtype for key in loaded if key.endswith("exp_avg_slow")} == {torch.float32}
    for key, value in loaded.items():
        assert torch.equal(value, same[key].to(value.dtype)), key
    for result in results:
        assert result["notes"] == ["exp_avg_slow was saved in bfloat16 and continues in float32 (state_dtype)"]
        states = result["memory"].states
        assert states["exp_avg_slow"] == 2 * states["exp_avg_fast"] == 2 * states["exp_avg_sq"]
