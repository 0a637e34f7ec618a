import warnings
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import anemoi_dist.configs
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import AdEMAMix, create_optimizer

from .problems import random_problem, run

#: The documentation page of anemoi-training, and the preset of its default configuration.
PAGE = """
adam:
   optimizer:
      _target_: torch.optim.Adam
      betas: [0.9, 0.95]
      weight_decay: 0.1
ademamix:
   optimizer:
      _target_: anemoi.training.optimizers.AdEMAMix.AdEMAMix
      betas: [0.9, 0.999, 0.9999]
      alpha: 2.0
      weight_decay: 0.01
      beta3_warmup: 1000
      alpha_warmup: 1000
preset:
   optimizer:
      _target_: anemoi.training.optimizers.AdEMAMix.AdEMAMix
      betas: [0.9, 0.95, 0.9999]
      alpha: 8.0
      beta3_warmup: 260000
      alpha_warmup: 260000
      weight_decay: 0.01
"""


def params():
    yield torch.nn.Parameter(torch.ones(3))


def snippet(name):
    return yaml.safe_load(PAGE)[name]["optimizer"]


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("ademamix", AdEMAMix), ("preset", AdEMAMix)])
def test_snippets_work_as_they_stand(name, kind, make):
    optimizer = create_optimizer(make(snippet(name)), params(), lr=6.25e-5)
    assert type(optimizer) is kind
    [group] = optimizer.param_groups
    assert group["lr"] == 6.25e-5
    for key, value in snippet(name).items():
        if key != "_target_":
            assert (list(group[key]) if key == "betas" else group[key]) == value
    assert type(group["betas"]) in (tuple, list)
    [p] = group["params"]
    run(optimizer, [p], [[torch.ones(3)]])
    assert not torch.equal(p, torch.ones(3))


def test_snippet_trains_as_the_class_does():
    one, rows = random_problem([(5,)], num_steps=20)
    other = [p.clone() for p in one]
    run(create_optimizer(snippet("ademamix"), one, lr=0.01), one, rows)
    direct = AdEMAMix(other, 0.01, weight_decay=0.01, beta3_warmup=1000, alpha_warmup=1000)
    run(direct, other, rows)
    assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "NAdam", "Adagrad", "Adamax", "RAdam", "ASGD", "Rprop"])
def test_any_optimizer_of_torch(name):
    optimizer = create_optimizer({"_target_": f"torch.optim.{name}"}, params(), lr=0.25)
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_learning_rate_and_parameters_are_injected_only():
    with pytest.raises(ConfigError, match=r"training\.lr\.rate=0\.1"):
        create_optimizer({**snippet("adam"), "lr": 0.1}, params(), lr=0.1)
    with pytest.raises(ConfigError, match="comes from the model"):
        create_optimizer({**snippet("adam"), "params": []}, params(), lr=0.1)


def test_unknown_argument_lists_the_valid_ones_with_defaults():
    with pytest.raises(ConfigError) as caught:
        create_optimizer({**snippet("ademamix"), "beta3_warm_up": 10}, params(), lr=0.1)
    assert "nearest: beta3_warmup" in str(caught.value)
    assert "alpha_warmup=None" in str(caught.value)
    assert "lr" not in caught.value.valid


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1},
        {"_target_": "torch.optim.adamw.adamw"},
        {"_target_": "anemoi_dist.optimizers.ademamix_schedules.half_life", "beta": 0.9, "form": "paper"},
        {"_target_": "torch.optim.AdamW", "betas": [2.0, 0.9]},
        {"_target_": "torch.optim.AdamW", "betas": [0.9]},  # IndexError
        {"_target_": "torch.optim.AdamW", "fused": True, "foreach": True},  # RuntimeError
        {"_target_": "torch.optim.Muon"},  # refuses the parameters
        {"_target_": "torch.nn.Linear"},
        {"betas": [0.9, 0.95]},
    ],
)
def test_what_builds_no_optimizer_is_refused(node):
    with pytest.raises(ConfigError, match=r"^training\.optimizer"):
        create_optimizer(node, params(), lr=0.1)


def test_errors_of_our_optimizer_name_the_whole_key():
    with pytest.raises(ConfigError, match=r"^training\.optimizer\.betas="):
        create_optimizer({**snippet("ademamix"), "betas": [0.9, 0.95]}, params(), lr=0.1)


def test_warmup_longer_than_the_run_is_a_warning():
    with pytest.warns(UserWarning) as caught:
        create_optimizer(snippet("preset"), params(), lr=0.1, max_steps=150_000)
    for name, warning in zip(("alpha", "beta3"), caught, strict=True):
        assert f"{name}_warmup=260000 is longer than training.max_steps=150000" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_optimizer(snippet("preset"), params(), lr=0.1, max_steps=260_000)
        create_optimizer(snippet("preset"), params(), lr=0.1)


GROUP = Path(anemoi_dist.configs.__file__).parent / "training" / "optimizer"


@pytest.mark.parametrize("file", sorted(GROUP.glob("*.yaml")), ids=lambda file: file.stem)
def test_options_of_the_group_build_without_a_warning(file):
    config = OmegaConf.create({"training": {"max_steps": 50, "optimizer": OmegaConf.load(file)}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = create_optimizer(config.training.optimizer, params(), lr=0.1, max_steps=50)
    assert type(optimizer).__name__.lower() == file.stem
