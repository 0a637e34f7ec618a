"""Clipping happens inside the update: no pass over the gradients before it, where the optimizer can."""

import math

import pytest
from support import toy

LIMIT = 0.05


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
