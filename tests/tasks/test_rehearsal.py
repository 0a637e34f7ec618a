"""Models of users that the first step, the first save or the next start would refuse: refused at the start, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anemoi_dist.config.compose import compose
from anemoi_dist.engines.registry import check_state
from anemoi_dist.errors import ConfigError
from anemoi_dist.preflight.model_size import measure
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.rehearsal import rehearse

CPU = torch.device("cpu")
JOB = [
    "data=synthetic",
    "data.dataset.field_shape=[6,8]",
    "data.dataset.num_dates=120",
    "data.train.end=2000-01-15",
    "data.validation.start=2000-01-16",
    "data.validation.end=2000-01-22",
    "data.test.start=2000-01-23",
    "security.allowed_targets=[support.odd_models]",
]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configure(name: str, *more: str):
    return compose([*JOB, f"model._target_=support.odd_models.{name}", *more]).config


def built(name: str, *more: str):
    config = configure(name, *more)
    task = create_task(config)
    torch.manual_seed(0)
    return task, task.create_module(world_size=1), config


def refusal(name: str, *more: str) -> ConfigError:
    task, module, config = built(name, *more)
    with pytest.raises(ConfigError) as caught:
        check_state(module)
        rehearse(task, module, config, device=CPU)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OneColumn", "returns (1, 1, 48, 1) for an input of shape (1, 2, 1, 48, 2)"),
        ("Swapped", "returns (1, 48, 1, 2) for an input"),
        ("Dictionary", "returns dict for an input"),
    ],
)
def test_an_output_of_another_shape_is_refused_with_the_shape_that_is_needed(name: str, said: str) -> None:
    error = refusal(name)
    assert error.value == f"support.odd_models.{name}"
    assert said in str(error) and "return a tensor of shape (1, 1, 48, 2)" in error.fix


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OnRawInput", "support.odd_models.OnRawInput", "fails on the first sample: RuntimeError: mat1 and mat2"),
        ("Sparse", "model.table.weight", "has a sparse gradient"),
        ("Lazy", "model.a.weight", "lazy layer"),
        ("ExtraState", "model", "keeps state by get_extra_state"),
        ("ComplexBuffer", "model.twiddle", "buffer of torch.complex64"),
        ("LateBuffer", "model.seen", "of shape None before the first forward pass and () after it"),
        ("GrowingBuffer", "model.seen", "of shape (1,) before the first forward pass and (2,) after it"),
    ],
)
def test_what_cannot_be_trained_or_saved_is_refused_by_name(name: str, value: str, said: str) -> None:
    error = refusal(name)
    assert error.value == value and said in str(error)


@pytest.mark.parametrize("name", ["Plain", "ShiftsInPlace", "ComplexBuffer"])
def test_a_rehearsal_leaves_module_and_random_numbers_as_they_are(name: str) -> None:
    task, module, config = built(name, *["+model.persistent=false"] * (name == "ComplexBuffer"))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.manual_seed(3)
    check_state(module)
    rehearse(task, module, config, device=CPU)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_model_that_changes_its_input_trains_as_one_that_copies_it() -> None:
    losses = []
    for name in ("Shifted", "ShiftsInPlace"):
        task, module, _ = built(name, "training.rollout=2")
        losses.append(module(task.collate([task.samples("train").read(index, step=0) for index in range(2)])).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["OneColumn", "Dictionary", "LateBuffer", "ExtraState", "ComplexBuffer"])
def test_a_plan_refuses_the_same(name: str) -> None:
    with pytest.raises(ConfigError):
        measure(configure(name))
    measure(configure("Plain"))
