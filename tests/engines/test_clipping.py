"""Clipping by norm happens inside the update, where the optimizer can; clipping by value is that of torch."""

import math

import pytest
import torch
from support import toy

LIMIT = 0.05
#: Clips about half of the elements.
LARGEST = 0.01
SGD = {"_target_": "torch.optim.SGD", "momentum": 0.9}


def watch(world, engine_name, optimizer):
    """Return for one step: the norm of the gradients that the optimizer saw, its grad_scale, and the report."""
    overrides = {} if optimizer is None else {"optimizer": {"_target_": optimizer}}
    config = toy.make_config(engine_name, clip_grad_norm=LIMIT, **overrides)
    engine = toy.build(world, config)
    squares, scales = [], []

    def before_step(stepped, *_):
        gradients = [p.grad for group in stepped.param_groups for p in group["params"] if p.grad is not None]
        squares.extend(float(getattr(g, "full_tensor", lambda g=g: g)().square().sum()) for g in gradients)
        scales.append(float(getattr(stepped, "grad_scale", math.nan)))

    engine.optimizer.register_step_pre_hook(before_step)
    report = engine.train_step(toy.micro_batches(config, world, 0))
    left_over = hasattr(engine.optimizer, "grad_scale")
    engine.close()
    return math.sqrt(sum(squares)), set(scales), report.grad_norm, left_over


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_gradients_are_not_touched_before_the_update(ranks, engine):
    [(seen, scales, norm, left_over)] = ranks(1).run(watch, engine, None)
    assert norm > LIMIT
    assert seen == pytest.approx(norm, rel=1e-5)
    assert list(scales) == pytest.approx([norm / LIMIT], rel=1e-4)
    assert not left_over


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_other_optimizers_get_clipped_gradients(ranks, engine):
    [(seen, _, norm, _)] = ranks(1).run(watch, engine, "torch.optim.AdamW")
    assert norm > LIMIT
    assert seen == pytest.approx(LIMIT, rel=1e-4)


def train(world, engine_name, training, num_steps, not_finite):
    """Return shards and reports; in the step ``not_finite`` the last rank's gradient is none."""
    config = toy.make_config(engine_name, **training)
    engine = toy.build(world, config)
    reports = []
    for step in range(num_steps):
        batches = toy.micro_batches(config, world, step)
        if step == not_finite and world.rank == world.world_size - 1:
            batches[0].fields.fill_(math.nan)
        reports.append(engine.train_step(batches))
    shards = toy.clone_shards(engine)
    engine.close()
    return shards, reports


@pytest.mark.parametrize(
    ("precision", "optimizer", "tolerance"), [("fp32", None, 1e-6), ("fp32", SGD, 1e-6), ("bf16", SGD, 1e-2)]
)
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_by_value_equals_torch(ranks, engine, precision, optimizer, tolerance):
    training = {"clip_grad_value": LARGEST, "micro_batch_size": 2, **({"optimizer": optimizer} if optimizer else {})}
    expected, _, norms = toy.reference(toy.make_config("ddp", **training), 5)
    # One step more, the last, which is not finite: it must not be clipped to something finite.
    results = ranks(2).run(train, engine, training | {"precision": precision}, 6, 5)
    whole = toy.whole_tensors([shards for shards, _ in results])
    for key, value in expected.items():
        if key.endswith(":param"):
            assert torch.allclose(whole[key].float(), value, rtol=tolerance, atol=tolerance), key
    reports = results[0][1]
    assert reports[5].skipped and not any(report.skipped for report in reports[:5])
    assert [report.grad_norm for report in reports[:5]] == pytest.approx(
        norms, rel=1e-4 if precision == "fp32" else 0.1
    )
    unclipped, *_ = toy.reference(toy.make_config("ddp", **training | {"clip_grad_value": None}), 5)
    assert not torch.allclose(unclipped["model.head.weight:param"], expected["model.head.weight:param"], rtol=0.05)
