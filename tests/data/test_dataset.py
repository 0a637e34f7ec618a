import numpy as np
import pytest
import torch

from anemoi_dist.data.anemoi import open_anemoi, open_split
from anemoi_dist.data.dataset import WeatherDataset
from anemoi_dist.errors import ConfigError

from .conftest import NOISE, SAMPLE, Recorder, raw_sample


def noise(**options) -> WeatherDataset:
    fields = open_anemoi(NOISE, **options)
    return WeatherDataset(fields, train=fields, forcing=("c",), multistep_input=2, rollout=1)


def test_sample_is_what_the_zarr_holds(era5):
    test = open_split(era5, "test", rollout=2)
    batch = test[3]
    data = raw_sample()["data"][100 + 3 : 100 + 7]
    assert batch.fields.shape == (4, 1, 10512, 10)
    np.testing.assert_array_equal(batch.fields.numpy(), data.transpose(0, 2, 3, 1))
    assert np.datetime64(int(batch.dates), "s") == np.datetime64("2025-12-27T00:00:00")


# Missing dates and gaps


def test_missing_dates_are_never_read():
    fields = Recorder(open_anemoi(NOISE, set_missing_dates=["2020-01-02T06:00:00", "2020-01-05T18:00:00"]))
    dataset = WeatherDataset(fields, train=fields, forcing=("c",), multistep_input=2, rollout=1)
    assert fields.missing == {5, 19}
    dataset.spec()
    for index in range(len(dataset)):
        dataset[index]
    assert fields.read == set(range(20)) - {5, 19}
    assert len(dataset) == 14 and dataset.num_dropped == 4


def test_no_sample_spans_a_gap(era5):
    parts = [{"dataset": SAMPLE, "end": "2025-12-10"}, {"dataset": SAMPLE, "start": "2025-12-13"}]
    era5.dataset, era5.options = {"concat": parts, "fill_missing_gaps": True}, {}
    train = open_split(era5, "train", rollout=1)
    assert train.num_dropped == 8 + 2
    for start in train.starts:
        assert (np.diff(train.dates_s[start : start + 3]) == 21600).all()
    assert torch.isfinite(train[38].fields).all()


def test_split_without_two_consecutive_states_is_refused():
    with pytest.raises(ConfigError, match="has 20 states and no 3 consecutive ones"):
        noise(set_missing_dates=list(range(0, 20, 2)))


# Statistics


def test_statistics_are_of_the_training_split(era5):
    spec = open_split(era5, "test", rollout=1).spec()
    data = raw_sample()["data"][:84, :, 0].astype(np.float64)
    np.testing.assert_allclose(spec.mean, data.mean((0, 2)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(spec.stdev, data.std((0, 2)), rtol=1e-6)
    msl = spec.variables.index("msl")
    np.testing.assert_allclose(spec.tendency_stdev[msl], np.diff(data[:, msl], axis=0).std(), rtol=1e-9)
    assert spec.prognostic == ("msl",) and spec.prognostic_indices == [msl]
    assert spec.field_shape == (73, 144) and spec.frequency_s == 21600 and spec.multistep_input == 2
    assert spec.latitudes.shape == (10512,) and (spec.tendency_stdev > 0).all()


def test_every_split_has_the_same_spec(era5):
    specs = [open_split(era5, name, rollout=1).spec() for name in ("train", "validation")]
    for name in ("mean", "stdev", "tendency_stdev"):
        np.testing.assert_array_equal(getattr(specs[0], name), getattr(specs[1], name))


def test_recorded_tendencies_are_used_and_constants_are_guarded():
    spec = noise().spec()
    np.testing.assert_allclose(spec.tendency_stdev, [2**0.5, 2**0.5, 1.0])
    np.testing.assert_allclose(spec.stdev, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(spec.mean, [0.0, 0.0, 3.0])


def test_statistics_that_are_not_finite_are_refused():
    variables = [{"name": "a", "statistics": {"mean": float("nan")}}, "b"]
    fields = open_anemoi({"synthetic": NOISE["synthetic"] | {"variables": variables}})
    dataset = WeatherDataset(fields, train=fields, multistep_input=1, rollout=1)
    with pytest.raises(ConfigError, match=r"data.options.drop=\[a\]"):
        dataset.spec()


def test_tendency_is_estimated_from_bounded_reads(monkeypatch):
    monkeypatch.setattr("anemoi_dist.data.fields.MAX_TENDENCY_PAIRS", 7)
    fields = Recorder(open_anemoi(SAMPLE, select=["msl"]))
    dataset = WeatherDataset(fields, train=fields, multistep_input=1, rollout=1)
    assert 200 < dataset.spec().tendency_stdev[0] < 300
    assert len(fields.read) <= 14
    assert len({index % 4 for index in fields.read}) == 4
