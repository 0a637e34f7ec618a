"""Models that are not as tidy as one would like: unused branches, statistics of their own, shapes that do not cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import toy
from torch import nn

from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import _check_parameters
from anemoi_dist.errors import ConfigError

NUM_STEPS = 6
#: Three micro-batches a step: a branch is used by the first and the last, in the next step by the second.
IN_THREES = {"global_batch_size": 6, "micro_batch_size": 1}
Trained = tuple[list[float], list, torch.Tensor]


def sometimes_config(engine: str, **training: int) -> Config:
    config = toy.make_config(engine, **training)
    config.model = {"_target_": "support.toy.SometimesModel"}
    return config


def train(world: World, engine: str, **training: int) -> Trained:
    config = sometimes_config(engine, **training)
    built = toy.build(world, config)
    losses = [built.train_step(toy.micro_batches(config, world, step)).loss for step in range(NUM_STEPS)]
    shards = toy.clone_shards(built)
    prediction = built.evaluate(toy.make_batch(9), rollout=1)
    built.close()
    return losses, shards, prediction


@pytest.fixture(scope="module")
def trained(ranks) -> Callable[..., list[Trained]]:
    """Return ``trained(engine, **training)``: what both ranks have then, trained once for all tests."""
    results: dict[str, list[Trained]] = {}

    def get(engine: str, **training: int) -> list[Trained]:
        key = repr((engine, training))
        if key not in results:
            results[key] = ranks(2).run(partial(train, **training), engine)
        return results[key]

    return get


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_a_branch_that_a_step_does_not_use_is_not_stepped_with_an_old_gradient(trained, engine: str) -> None:
    # DeepSpeed gives a parameter without a gradient a zero one, the others leave it alone.
    peer = "zero0" if engine.startswith("zero") else "ddp"
    expected, results = trained(peer), trained(engine)
    assert results[0][0] == pytest.approx(expected[0][0], rel=1e-5)
    assert results[0][0] == results[1][0]
    whole, reference = (toy.whole_tensors([r[1] for r in each]) for each in (results, expected))
    torch.testing.assert_close(whole["model.sometimes.weight:param"], reference["model.sometimes.weight:param"])
    before = toy.make_module(sometimes_config(engine)).state_dict()["model.never.weight"]
    assert whole["model.never.weight:param"].shape == before.shape


@pytest.mark.parametrize("engine", sorted(set(toy.ENGINES) - {"zero3_offload"}))
def test_a_branch_that_some_micro_batches_do_not_use(trained, engine: str) -> None:
    expected, results = trained("zero0", **IN_THREES), trained(engine, **IN_THREES)
    whole, reference = (toy.whole_tensors([r[1] for r in each]) for each in (results, expected))
    for name in ("always", "sometimes"):
        torch.testing.assert_close(whole[f"model.{name}.weight:param"], reference[f"model.{name}.weight:param"])


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_ranks_forecast_with_the_same_statistics(trained, engine: str) -> None:
    first, second = trained(engine)
    assert torch.equal(first[2], second[2])


class Holder(nn.Module):
    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        self.values = nn.ParameterList(parameters)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (nn.Parameter(torch.tensor(1.0)), "has no dimension"),
        (nn.Parameter(torch.zeros(0, 3)), "has no element"),
        (nn.Parameter(torch.zeros(3, dtype=torch.float64)), r"is torch.float64"),
        (nn.Parameter(torch.zeros(3), requires_grad=False), "takes a gradient"),
    ],
)
def test_parameters_that_cannot_be_cut_are_refused_by_name(parameter: nn.Parameter, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check_parameters(Holder(parameter), toy.make_config("ddp"))  # type: ignore[arg-type]


def refused(world: World, engine: str, target: str) -> str:
    config = toy.make_config(engine)
    config.training.optimizer = {"_target_": target}
    try:
        toy.build(world, config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("ddp", "LBFGS"),
        ("zero2", "Adafactor"),
        ("ddp", "Adafactor"),
        ("zero1", "Adagrad"),
        ("zero3", "Adagrad"),
        ("fsdp2", "Rprop"),
    ],
)
def test_an_optimizer_that_cannot_be_right_is_refused(ranks, engine: str, optimizer: str) -> None:
    (text,) = ranks(1).run(refused, engine, f"torch.optim.{optimizer}")
    assert optimizer in text and f"engine={engine}" in text


def saved_with_a_late_buffer(world: World, engine: str) -> str:
    built = toy.build(world, toy.make_config(engine))
    built.module.register_buffer("late", torch.zeros(2))
    try:
        list(built.shards())
    except ConfigError as error:
        return str(error)
    finally:
        built.close()
    return ""


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_buffer_that_could_not_be_loaded_is_refused_at_the_save(ranks, engine: str) -> None:
    (text,) = ranks(1).run(saved_with_a_late_buffer, engine)
    assert "'late'" in text and "of shape None" in text and "(2,) after it" in text
