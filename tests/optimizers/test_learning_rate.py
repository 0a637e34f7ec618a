import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import anemoi_dist.configs
from anemoi_dist.config.schema import LrConfig
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import AdEMAMix
from anemoi_dist.optimizers.learning_rate import create_scheduler, scaled_rate, set_num_updates

COSINE = {"_target_": "timm.scheduler.CosineLRScheduler"}
NODES = {
    "cosine": COSINE,
    "cosine, noisy": {**COSINE, "noise_range_t": [5, 40], "noise_pct": 0.3},
    "timm step": {"_target_": "timm.scheduler.StepLRScheduler", "decay_t": 9, "decay_rate": 0.5},
    "timm poly": {"_target_": "timm.scheduler.poly_lr.PolyLRScheduler"},
    "step": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 7, "gamma": 0.3},
    "exponential": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.97},
    "annealing": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR"},
    "restarts": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "T_0": 6},
    "one cycle": {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": 60},
}


def torch_node(name):
    return {"_target_": f"torch.optim.lr_scheduler.{name}"}


def optimizer(lr=0.02, **options):
    return AdEMAMix([torch.zeros(2)], lr=lr, **options)


def rates(node, lr, *, max_steps, updates):
    adam = optimizer(lr.rate)
    scheduler = create_scheduler(node, adam, lr=lr, max_steps=max_steps)
    found = []
    for k in updates:
        set_num_updates(scheduler, k)
        found.append(adam.param_groups[0]["lr"])
    return found


def test_default_cosine_is_its_formula():
    lr = LrConfig(rate=0.02, iterations=50, min=1e-3, warmup=9)
    found = rates(COSINE, lr, max_steps=80, updates=range(80))
    for k, rate in enumerate(found):
        if k < 9:
            expected = 0.02 * (k + 1) / 10
        elif k < 50:
            expected = 1e-3 + (0.02 - 1e-3) * (1 + math.cos(math.pi * k / 50)) / 2
        else:
            expected = 1e-3
        assert rate == pytest.approx(expected, rel=1e-12), k
    assert found[0] > 0.0


def test_iterations_default_to_the_run():
    assert rates(COSINE, LrConfig(rate=0.02), max_steps=40, updates=[0, 20, 40]) == pytest.approx([0.02, 0.01, 0.0])


def test_rate_of_the_first_update_is_set_at_once():
    adam = optimizer()
    create_scheduler(COSINE, adam, lr=LrConfig(rate=0.02, warmup=3), max_steps=10)
    assert adam.param_groups[0]["lr"] == 0.02 / 4


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(list(NODES)), path=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_rate_does_not_depend_on_the_way(name, path):
    lr = LrConfig(rate=0.02)
    stepped = rates(NODES[name], lr, max_steps=60, updates=range(61))
    assert rates(NODES[name], lr, max_steps=60, updates=path) == [stepped[k] for k in path]
    assert len(set(stepped)) > 1


def test_going_back_restores_what_else_the_scheduler_moves():
    adam = optimizer()
    scheduler = create_scheduler(NODES["one cycle"], adam, lr=LrConfig(rate=0.02), max_steps=60)
    start = dict(adam.param_groups[0])
    set_num_updates(scheduler, 30)
    assert adam.param_groups[0]["betas"] != start["betas"]
    set_num_updates(scheduler, 0)
    assert {**adam.param_groups[0]} == start
    plain = torch.optim.lr_scheduler.StepLR(optimizer(), 3)
    set_num_updates(plain, 5)
    with pytest.raises(RuntimeError, match="create_scheduler"):
        set_num_updates(plain, 2)


def test_tensor_rate_is_kept_by_torch_schedulers():
    rate = torch.tensor(0.02)
    adam = optimizer(rate)
    scheduler = create_scheduler(NODES["step"], adam, lr=LrConfig(rate=0.02), max_steps=20)
    for k, expected in ((8, 0.006), (2, 0.02)):
        set_num_updates(scheduler, k)
        assert adam.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(expected)


def test_replay_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(NODES["step"], LrConfig(rate=0.02), max_steps=20, updates=[5, 6, 3])


def test_groups_keep_their_own_rates():
    adam = AdEMAMix([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.002}], lr=0.02)
    scheduler = create_scheduler(COSINE, adam, lr=LrConfig(rate=0.02), max_steps=10)
    set_num_updates(scheduler, 5)
    assert [g["lr"] for g in adam.param_groups] == pytest.approx([0.01, 0.001])


def test_node_wins_over_the_rate_block():
    node = {**COSINE, "t_initial": 20, "lr_min": 0.005, "warmup_t": 4}
    found = rates(node, LrConfig(rate=0.02), max_steps=100, updates=[0, 10, 20])
    assert found == pytest.approx([0.02 / 5, 0.0125, 0.005])


def test_constant_rate():
    assert create_scheduler(None, optimizer(), lr=LrConfig(rate=0.02), max_steps=10) is None
    set_num_updates(None, 5)
    with pytest.warns(UserWarning, match=r"training\.lr\.warmup=5 has no effect"):
        create_scheduler(None, optimizer(), lr=LrConfig(rate=0.02, warmup=5), max_steps=10)


def test_settings_without_effect_are_a_warning():
    with pytest.warns(UserWarning) as caught:
        create_scheduler(NODES["step"], optimizer(), lr=LrConfig(rate=0.02, min=0.01, iterations=5), max_steps=10)
    assert ["training.lr.iterations=5" in str(w.message) for w in caught] == [True, False]
    with pytest.warns(UserWarning, match=r"training\.lr\.warmup=20 is longer than training\.max_steps=10"):
        create_scheduler(COSINE, optimizer(), lr=LrConfig(rate=0.02, warmup=20), max_steps=10)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({**COSINE, "t_in_epochs": True}, "every optimizer step"),
        ({**COSINE, "lr_minimum": 0.1}, "nearest: lr_min"),
        ({**COSINE, "optimizer": 1}, "comes from"),
        ({**COSINE, "t_initial": 0}, "refuses it"),
        ({"_target_": "timm.scheduler.PlateauLRScheduler"}, "not on a score"),
        ({"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "not on a score"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR"}, "needs it"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3, "last_epoch": 4}, "checkpoint"),
        ({"_target_": "torch.optim.AdamW"}, "must be a kind of"),
        ({"_target_": "timm.scheduler.create_scheduler"}, "must be a kind of"),
        ({"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": 5}, "ends before"),
        ({"_target_": "timm.create_model"}, "allow-list"),
        # What a library raises that indexes, divides or compares before it checks, now or later, with text or none.
        ({**torch_node("CyclicLR"), "base_lr": 0.1, "max_lr": 0.2, "step_size_up": 0}, "ZeroDivisionError"),
        ({"_target_": "timm.scheduler.StepLRScheduler", "decay_t": 0}, "ZeroDivisionError"),
        ({**COSINE, "t_initial": 0}, "AssertionError"),
        ({**COSINE, "cycle_mul": 0.5, "t_initial": 4, "cycle_limit": 9}, "has no rate for the update after step"),
        ({**torch_node("OneCycleLR"), "max_lr": 0.1, "epochs": 1, "steps_per_epoch": 5}, "after step 6: ValueError"),
        ({**torch_node("StepLR"), "step_size": "7"}, "after step 1: TypeError"),
        ({**torch_node("StepLR"), "step_size": 0}, "after step 1: ZeroDivisionError"),
        ({**torch_node("CosineAnnealingLR"), "T_max": 0}, "ZeroDivisionError"),
        ({**torch_node("ExponentialLR"), "gamma": -0.5}, r"after step 1: it gives \[-0\.01\]"),
        ({**torch_node("ExponentialLR"), "gamma": math.nan}, "after step 1: it gives"),
        ({**torch_node("ExponentialLR"), "gamma": 1e200}, "after step 2: it gives"),
        ({**torch_node("LambdaLR"), "lr_lambda": "x"}, "is not callable"),
        # Nested ones.
        ({**torch_node("LambdaLR"), "lr_lambda": {"_target_": "my_module.rate"}}, "class of yours"),
        (
            {
                **torch_node("SequentialLR"),
                "schedulers": [torch_node("LinearLR"), torch_node("ConstantLR")],
                "milestones": [5],
            },
            r"class Mine\(torch",
        ),
        (
            {**torch_node("ChainedScheduler"), "schedulers": [torch_node("LinearLR")], "milestones": [5]},
            "CosineLRScheduler",
        ),
    ],
)
def test_refusals(node, message):
    with pytest.raises(ConfigError, match=message) as caught:
        create_scheduler(node, optimizer(), lr=LrConfig(rate=0.02), max_steps=10)
    assert caught.value.key.startswith("training.scheduler")


@pytest.mark.parametrize(("scale_with", "rate"), [("none", 0.5), ("world_size", 2.0)])
def test_scaled_rate(scale_with, rate):
    assert scaled_rate(LrConfig(rate=0.5, scale_with=scale_with), 4) == rate


GROUP = Path(anemoi_dist.configs.__file__).parent / "training" / "scheduler"


@pytest.mark.parametrize("name", sorted({file.stem for file in GROUP.glob("*.yaml")} - {"none"}))
def test_options_of_the_group_build_and_warm_up(name):
    adam = optimizer()
    create_scheduler(OmegaConf.load(GROUP / f"{name}.yaml"), adam, lr=LrConfig(rate=0.02, warmup=4), max_steps=10)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.02 / 5)
