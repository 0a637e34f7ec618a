"""``TaskModule.gradient_factors``: a gradient is multiplied once, before norm, clipping and update, by every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import toy

from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import create_engine

NUM_STEPS = 4
FACTORS = {"model.blocks.1.weight": 0.25, "model.gain": 3.0}
TRAINING = {"micro_batch_size": 1, "clip_grad_norm": 0.05}


def train(world: World, engine_name: str, overlap: bool) -> dict[str, Any]:
    config = toy.make_config(engine_name, **TRAINING)
    config.engine.overlap = overlap
    module = toy.make_module(config)
    module.gradient_factors = dict(FACTORS)
    engine = create_engine(module, config=config, world=world)
    reports = [engine.train_step(toy.micro_batches(config, world, step)) for step in range(NUM_STEPS)]
    result = {"norms": [report.grad_norm for report in reports], "shards": toy.clone_shards(engine)}
    engine.close()
    return result


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, torch.Tensor], list[float]]:
    config, make_module = toy.make_config("ddp", **TRAINING), toy.make_module

    def make_hooked(config: Any) -> Any:
        module = make_module(config)
        for name, factor in FACTORS.items():
            module.get_parameter(name).register_hook(lambda gradient, factor=factor: gradient * factor)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "make_module", make_hooked)
        values, _, norms = toy.reference(config, NUM_STEPS)
    return values, norms


@pytest.mark.parametrize(
    ("engine_name", "overlap"), [*((name, False) for name in toy.ENGINES), ("zero2", True), ("fsdp2", True)]
)
def test_as_multiplied_in_a_single_process(ranks, expected, engine_name, overlap):
    values, norms = expected
    results = ranks(2).run(train, engine_name, overlap)
    assert results[0]["norms"] == results[1]["norms"] == pytest.approx(norms, rel=1e-4)
    whole = toy.whole_tensors([result["shards"] for result in results])
    for name, value in values.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-6)
