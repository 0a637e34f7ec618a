"""The model for latitude-longitude grids: what it must know of the sphere, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from anemoi_dist.data.batch import DataSpec
from anemoi_dist.errors import ConfigError
from anemoi_dist.models.latlon import LatLonCNN, SphericalPad


def make_spec(rows: int = 9, columns: int = 16, *, poles: bool = True) -> DataSpec:
    edge = 90 if poles else 90 * (1 - 1 / rows)
    latitudes, longitudes = np.meshgrid(
        np.linspace(edge, -edge, rows), np.arange(columns) * 360 / columns, indexing="ij"
    )
    return DataSpec(
        variables=("t", "cos_latitude", "u"),
        forcing=("cos_latitude",),
        latitudes=latitudes.ravel(),
        longitudes=longitudes.ravel(),
        field_shape=(rows, columns),
        mean=np.zeros(3),
        stdev=np.ones(3),
        tendency_stdev=np.ones(3),
        multistep_input=2,
        frequency_s=21600,
    )


def trained(spec: DataSpec, **options: object) -> LatLonCNN:
    """A model whose last layer is not zero any more."""
    torch.manual_seed(0)
    model = LatLonCNN(spec, hidden_channels=8, **{"dilations": (1, 2), **options})
    torch.nn.init.normal_(model.decode.weight)
    return model


def sphere(spec: DataSpec, *, rows: int, columns: int) -> torch.Tensor:
    """A smooth scalar on the sphere, continued ``rows`` and ``columns`` beyond the edges of the grid."""
    height, width = spec.field_shape
    first, step = spec.latitudes[0], spec.latitudes[width] - spec.latitudes[0]
    latitude = np.deg2rad(first + step * np.arange(-rows, height + rows))[:, None]
    longitude = np.deg2rad(360 / width * np.arange(-columns, width + columns))[None]
    # Cartesian coordinates do not care that a latitude went over the pole.
    x, y, z = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)
    return torch.tensor(x + 2 * y * z - 0.5 * x * y)


@pytest.mark.parametrize("poles", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_padding_continues_a_field_over_the_poles_and_round_the_globe(poles, size):
    spec = make_spec(poles=poles)
    padded = SphericalPad(size, pole_rows=(poles, poles))(sphere(spec, rows=0, columns=0))
    torch.testing.assert_close(padded, sphere(spec, rows=size, columns=size), atol=1e-12, rtol=0)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("poles", [True, False])
def test_shapes_and_start_at_persistence(patch_size, poles):
    spec = make_spec(poles=poles)
    model = LatLonCNN(spec, hidden_channels=8, dilations=(1,), patch_size=patch_size, trainable_channels=2)
    tendency = model(torch.randn(2, 2, 3, 9 * 16, 3))
    assert tendency.shape == (2, 3, 9 * 16, 2)
    assert torch.equal(tendency, torch.zeros_like(tendency))


@pytest.mark.parametrize(("patch_size", "shift"), [(1, 5), (2, 6)])
def test_turning_the_globe_turns_the_forecast(patch_size, shift):
    spec = make_spec()
    model = trained(spec, patch_size=patch_size).double()
    x = torch.randn(1, 2, 1, 9, 16, 3, dtype=torch.float64)
    straight = model(x.flatten(3, 4)).unflatten(2, (9, 16))
    turned = model(x.roll(shift, 4).flatten(3, 4)).unflatten(2, (9, 16))
    torch.testing.assert_close(turned, straight.roll(shift, 3), atol=1e-12, rtol=0)
    assert not torch.allclose(turned, straight)


def test_every_prognostic_variable_lands_in_its_own_column():
    spec = make_spec()
    model = trained(spec, patch_size=2)
    with torch.no_grad():
        model.decode.weight.zero_()
        model.decode.bias.copy_(torch.arange(8.0))
    tendency = model(torch.randn(1, 2, 1, 9 * 16, 3)).unflatten(2, (9, 16))
    # Channels of pixel shuffle: all places of a patch of the first variable, then of the second.
    assert tendency[0, 0, :2, :2, 0].flatten().tolist() == [0, 1, 2, 3]
    assert tendency[0, 0, :2, :2, 1].flatten().tolist() == [4, 5, 6, 7]


def test_learned_fields_break_the_symmetry_of_longitude():
    model = trained(make_spec(), trainable_channels=2)
    with torch.no_grad():
        model.place.normal_()
    tendency = model(torch.zeros(1, 2, 1, 9 * 16, 3)).unflatten(2, (9, 16))
    assert tendency.std(3).min() > 0


def test_runs_and_learns_in_bfloat16():
    model = trained(make_spec()).bfloat16()
    tendency = model(torch.randn(2, 2, 1, 9 * 16, 3, dtype=torch.bfloat16))
    tendency.square().mean().backward()
    assert tendency.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("spec", "options", "key"),
    [
        (replace(make_spec(), field_shape=(144,)), {}, "model"),
        (replace(make_spec(), longitudes=make_spec().longitudes / 2), {}, "model"),
        (replace(make_spec(), latitudes=make_spec().latitudes / 2), {}, "model"),
        (replace(make_spec(), latitudes=make_spec().latitudes[::-1].reshape(16, 9).T.ravel()), {}, "model"),
        (make_spec(), {"hidden_channels": 0}, "model.hidden_channels"),
        (make_spec(), {"patch_size": 3}, "model.patch_size"),
        (make_spec(), {"dilations": (1, 9)}, "model.dilations"),
        (make_spec(), {"dilations": ()}, "model.dilations"),
    ],
)
def test_refuses_what_does_not_fit(spec, options, key):
    with pytest.raises(ConfigError) as caught:
        LatLonCNN(spec, **options)
    assert caught.value.key == key
