import numpy as np
import pytest

from anemoi_dist.config.schema import DataConfig, SplitConfig
from anemoi_dist.data.anemoi import open_split
from anemoi_dist.data.synthetic import SyntheticFields
from anemoi_dist.errors import ConfigError

from .conftest import load


def fields(**dataset) -> SyntheticFields:
    return SyntheticFields.from_config(DataConfig(kind="synthetic", dataset=dataset))


def test_any_slice_gives_the_same_states():
    waves = fields(field_shape=[5, 8], num_dates=12)
    whole = waves[:]
    assert whole.shape == waves.shape == (12, 2, 1, 40) and whole.dtype == np.float32
    np.testing.assert_array_equal(waves[3:7], whole[3:7])
    np.testing.assert_array_equal(fields(field_shape=[5, 8], num_dates=5)[3:5], whole[3:5])


def test_a_split_is_part_of_the_whole():
    waves = fields(num_dates=40)
    part = waves.between(SplitConfig("2000-01-03", "2000-01-05"), name="test")
    assert len(part) == 12 and part.dates[-1] == np.datetime64("2000-01-05T18:00:00")
    np.testing.assert_array_equal(part[:2], waves[8:10])


def test_weather_does_not_depend_on_resolution():
    coarse, fine = fields(field_shape=[5, 8], num_dates=2), fields(field_shape=[9, 16], num_dates=2)
    sub = fine[:].reshape(2, 2, 9, 16)[:, :, ::2, ::2]
    np.testing.assert_allclose(coarse[:].reshape(2, 2, 5, 8), sub, rtol=1e-6)


def test_statistics_in_closed_form_are_right():
    waves = fields(field_shape=[32, 64], num_dates=4000)
    states = waves[::7][:, :, 0].astype(np.float64)
    np.testing.assert_allclose(waves.statistics["mean"], states.mean((0, 2)), rtol=1e-3)
    np.testing.assert_allclose(waves.statistics["stdev"], states.std((0, 2)), rtol=0.02)
    changes = np.diff(waves[:1200][:, :, 0].astype(np.float64), axis=0)
    np.testing.assert_allclose(waves.statistics_tendencies()["stdev"], changes.std((0, 2)), rtol=0.02)


def test_waves_move_and_vanish_at_the_poles():
    waves = fields(field_shape=[9, 16], num_dates=2)
    states = waves[:].reshape(2, 2, 9, 16)
    assert np.abs(states[1] - states[0]).max() > 1
    np.testing.assert_allclose(states[:, :, 0].std(-1), 0, atol=1e-4)


def test_shipped_configuration_has_three_splits():
    data = load("synthetic")
    sizes = {name: len(open_split(data, name, rollout=4)) for name in ("train", "validation", "test")}
    assert sizes["train"] > 800 and min(sizes.values()) > 40 and sum(sizes.values()) == 1024 - 3 * 5


def test_open_split_gives_samples_and_spec(waves):
    dataset = open_split(waves, "validation", rollout=3)
    assert dataset[0].fields.shape == (5, 1, 48, 2)
    spec = dataset.spec()
    assert spec.field_shape == (6, 8) and spec.prognostic == ("wave_0", "wave_1") and spec.frequency_s == 21600
    assert spec.latitudes[0] == 90 and spec.longitudes[1] == 45


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataConfig(kind="synthetic", dataset={"num_datez": 3}), "nearest: num_dates"),
        (DataConfig(kind="synthetic", dataset="a.zarr"), "must be a mapping"),
        (DataConfig(kind="synthetic", dataset={"field_shape": [7]}), "field_shape"),
        (DataConfig(kind="synthetic", dataset={"num_dates": 0}), "at least 1"),
        (DataConfig(kind="synthetic", dataset={"start": "soon"}), "data.dataset.start"),
        (DataConfig(kind="synthetic", options={"select": ["a"]}), "no effect"),
        (DataConfig(kind="synthetic", train=SplitConfig("1990", "1991")), "2000-01-01"),
        (DataConfig(kind="synthetic", train=SplitConfig("soon", None)), "data.train.start"),
    ],
)
def test_errors(data, words):
    with pytest.raises(ConfigError, match=words):
        open_split(data, "train", rollout=1)
