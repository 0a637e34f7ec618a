"""The module: normalisation, rollout, loss, and what optimizer and scheduler come out of a configuration."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from anemoi_dist.config.parse import from_container
from anemoi_dist.config.schema import Config
from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks.forecast.module import BaseGraphModule, build_model

SPEC = DataSpec(
    variables=("msl", "insolation", "t"),
    forcing=("insolation",),
    latitudes=np.array([90.0, 60.0, 0.0, -60.0]),
    longitudes=np.array([0.0, 10.0, 20.0, 30.0]),
    field_shape=(4,),
    mean=np.array([101325.0, 0.2, 280.0]),
    stdev=np.array([1000.0, 0.3, 20.0]),
    tendency_stdev=np.array([250.0, 0.1, 2.0]),
    multistep_input=2,
    frequency_s=21600,
)


class Constant(nn.Module):
    """Forecasts the same normalised tendency everywhere and keeps what it was given."""

    def __init__(self, data: DataSpec, *, value: float = 0.0, exponent: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((len(data.prognostic),), value**exponent))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return self.weight.expand(x.shape[0], x.shape[2], x.shape[3], -1)


def not_a_model() -> int:
    return 3


def make_config(*, model: dict | None = None, scheduler: dict | str | None = "cosine", **training: object) -> Config:
    if scheduler == "cosine":
        scheduler = {"_target_": "timm.scheduler.CosineLRScheduler"}
    return from_container(
        {
            "training": {
                "max_steps": 10,
                "global_batch_size": 2,
                "optimizer": {"_target_": "torch.optim.SGD"},
                "scheduler": scheduler,
                **training,
            },
            "engine": {"kind": "ddp"},
            "data": {"kind": "synthetic"},
            "model": model or {"_target_": f"{__name__}.Constant"},
            "security": {"allowed_targets": [__name__]},
        }
    )


def make_module(*, world_size: int = 1, **options: object) -> BaseGraphModule:
    return BaseGraphModule(make_config(**options), spec=SPEC, world_size=world_size)


def make_batch(*, states: int = 4, size: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, states, 1, 4, 3, generator=generator)
    fields = torch.tensor(SPEC.mean) + noise * torch.tensor(SPEC.stdev)
    return Batch(fields.float(), torch.zeros(size, dtype=torch.int64))


def test_zero_tendency_is_persistence_in_physical_units():
    module, batch = make_module(), make_batch()
    forecast = module.denormalise(module.forecast(batch, rollout=2))
    expected = batch.fields[:, 1:2][..., [0, 2]].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(forecast, expected, rtol=1e-6, atol=0)
    assert forecast.dtype == torch.float32


def test_one_normalised_tendency_is_one_tendency_stdev():
    module, batch = make_module(model={"_target_": f"{__name__}.Constant", "value": 1.0}), make_batch()
    change = module.denormalise(module.forecast(batch, rollout=1))[:, 0] - batch.fields[:, 1][..., [0, 2]]
    torch.testing.assert_close(change, torch.tensor([250.0, 2.0]).expand_as(change), rtol=1e-4, atol=0.02)


def test_rollout_sees_its_own_forecasts_and_the_true_forcings():
    module, batch = make_module(model={"_target_": f"{__name__}.Constant", "value": 1.0}), make_batch(states=5)
    forecast = module.forecast(batch, rollout=3)
    truth = module.normalise(batch.fields)
    for step, seen in enumerate(module.model.seen):
        assert torch.equal(seen[..., 1], truth[:, step : step + 2, ..., 1])
    assert torch.equal(module.model.seen[0], truth[:, :2])
    assert torch.equal(module.model.seen[2][..., [0, 2]], forecast[:, :2])


def test_the_last_true_state_is_not_needed_to_forecast():
    module, batch = make_module(), make_batch(states=4)
    short = Batch(batch.fields[:, :3], batch.dates)
    assert torch.equal(module.forecast(batch, rollout=2), module.forecast(short, rollout=2))
    with pytest.raises(ValueError, match="needs 4 states"):
        module.forecast(short, rollout=3)


def test_forecast_does_not_read_the_future():
    module, batch = make_module(), make_batch(states=4)
    future = batch.fields.clone()
    future[:, 2:, ..., [0, 2]] = torch.nan
    assert torch.equal(module.forecast(batch, rollout=2), module.forecast(Batch(future, batch.dates), rollout=2))


def test_loss_is_the_area_weighted_error_in_tendency_units():
    module, batch = make_module(), make_batch()
    prediction = module.forecast(batch, rollout=2)
    weight = np.cos(np.deg2rad(SPEC.latitudes))
    weight /= weight.mean()
    fields = batch.fields.double().numpy()
    error = (fields[:, 1:2] - fields[:, 2:4])[..., [0, 2]] / SPEC.tendency_stdev[[0, 2]]
    expected = (error**2 * weight[:, None]).mean()
    loss = module.loss(prediction, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_error_at_the_pole_row_costs_nothing():
    module, batch = make_module(), make_batch()
    prediction = module.forecast(batch, rollout=1)
    worse = prediction.clone()
    worse[..., 0, :] += 10
    torch.testing.assert_close(module.loss(worse, batch), module.loss(prediction, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_constants_stay_float32_to_the_last_digit(dtype):
    module = make_module()
    before = {name: buffer.clone() for name, buffer in module.constants.named_buffers()}
    module.to(dtype)
    copied = copy.deepcopy(module)
    for name, buffer in copied.constants.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    assert module.model.weight.dtype == dtype


def test_low_precision_model_forecasts_float32():
    module, batch = make_module().bfloat16(), make_batch()
    module.compute_dtype = torch.bfloat16
    forecast = module.forecast(batch, rollout=2)
    assert module.model.seen[0].dtype == torch.bfloat16
    assert forecast.dtype == torch.float32
    torch.testing.assert_close(module.denormalise(forecast)[:, 0], batch.fields[:, 1][..., [0, 2]], rtol=1e-6, atol=0)


def test_autocast_computes_low_with_float32_weights():
    node = {"_target_": f"{__name__}.Linear"}
    module, batch = make_module(model=node), make_batch()
    module.autocast_dtype = torch.bfloat16
    forecast = module.forecast(batch, rollout=2)
    module.loss(forecast, batch).backward()
    assert module.model.computed_in == torch.bfloat16
    assert forecast.dtype == torch.float32
    assert module.model.layer.weight.grad.dtype == torch.float32


class Linear(nn.Module):
    def __init__(self, data: DataSpec) -> None:
        super().__init__()
        self.layer = nn.Linear(len(data.variables), len(data.prognostic))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tendency = self.layer(x[:, -1])
        self.computed_in = tendency.dtype
        return tendency


def test_only_parameters_are_saved():
    assert list(make_module().state_dict()) == ["model.weight"]


def test_configure_optimizers_has_the_form_of_the_anemoi_training_page():
    module = make_module(lr={"rate": 0.5, "warmup": 4})
    configured = module.configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.SGD)
    assert set(configured["lr_scheduler"]) == {"scheduler", "interval"}
    assert configured["lr_scheduler"]["interval"] == "step"
    assert configured["optimizer"].param_groups[0]["lr"] == pytest.approx(0.1)


def test_no_scheduler_is_a_constant_rate():
    configured = make_module(scheduler=None, lr={"rate": 0.5}).configure_optimizers()
    assert list(configured) == ["optimizer"]
    assert configured["optimizer"].param_groups[0]["lr"] == 0.5


def test_rate_scales_with_the_world_by_name_only():
    for scale_with, expected in (("none", 0.5), ("world_size", 2.0)):
        module = make_module(scheduler=None, lr={"rate": 0.5, "scale_with": scale_with}, world_size=4)
        assert module.configure_optimizers()["optimizer"].param_groups[0]["lr"] == expected


def test_any_optimizer_by_target_and_anemois_name_for_ours():
    module = make_module()
    node = {"_target_": "anemoi.training.optimizers.AdEMAMix.AdEMAMix", "betas": [0.9, 0.999, 0.999]}
    optimizer = module._create_optimizer_from_config(node)
    assert type(optimizer).__module__ == "anemoi_dist.optimizers.ademamix"
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999, 0.999)


def test_frozen_parameters_are_left_out():
    module = make_module()
    module.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    optimizer = module._create_optimizer_from_config({"_target_": "torch.optim.SGD"})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1


def test_training_lowers_the_loss():
    module, batch = make_module(lr={"rate": 0.5}), make_batch()
    optimizer = module.configure_optimizers()["optimizer"]
    first = last = math.nan
    for step in range(20):
        loss = module.loss(module.forecast(batch, rollout=2), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": f"{__name__}.Constant", "valeu": 1.0}, "nearest: value"),
        ({"_target_": f"{__name__}.Constant", "data": 1}, "filled in from the dataset"),
        ({"_target_": f"{__name__}.not_a_model"}, "must build a torch.nn.Module"),
        ({"_target_": "os.system", "command": "true"}, "os.system"),
    ],
)
def test_build_model_refuses(node, message):
    with pytest.raises(ConfigError, match=message):
        build_model(node, SPEC, [__name__])


def test_build_model_names_a_missing_argument():
    with pytest.raises(ConfigError, match=r"model\.required"):
        build_model({"_target_": f"{__name__}.Needy"}, SPEC, [__name__])


class Needy(nn.Module):
    def __init__(self, required: int) -> None:
        super().__init__()


def test_a_constant_variable_is_refused_by_name():
    spec = copy.copy(SPEC)
    object.__setattr__(spec, "stdev", np.array([1000.0, 0.0, 20.0]))
    with pytest.raises(ConfigError, match="stdev of insolation"):
        BaseGraphModule(make_config(), spec=spec)
