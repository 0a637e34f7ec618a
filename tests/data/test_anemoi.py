import json
import re
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from anemoi_dist.config import DataConfig, SplitConfig
from anemoi_dist.data.anemoi import SAMPLE_DIRECTORY, open_anemoi, open_split
from anemoi_dist.data.dataset import WeatherDataset
from anemoi_dist.data.fields import evenly_spaced, window_starts
from anemoi_dist.errors import ConfigError

SAMPLE = "sample:era5-msl-2025-12-2p5"
#: Given to anemoi-datasets: a dataset without a file, four states a day.
NOISE = {
    "synthetic": {
        "geography": {"bbox": [90, 0, -90, 315], "resolution": 45},
        "variables": ["a", "b", {"name": "c", "values": 3.0}],
        "dates": {"start": "2020-01-01", "end": "2020-01-05T18:00:00", "frequency": "6h"},
        "layout": "gridded",
    }
}


def raw_sample():
    return zarr.open(str(SAMPLE_DIRECTORY / "era5-msl-2025-12-2p5.zarr"), mode="r")


def noise(**options) -> WeatherDataset:
    fields = open_anemoi(NOISE, **options)
    return WeatherDataset(fields, train=fields, forcing=("c",), multistep_input=2, rollout=1)


class Recorder:
    """Fields that remember which dates were read."""

    def __init__(self, fields):
        self._fields, self.read = fields, set()

    def __getattr__(self, name):
        return getattr(self._fields, name)

    def __len__(self):
        return len(self._fields)

    def __getitem__(self, index):
        self.read |= set(range(*index.indices(len(self))))
        return self._fields[index]


# The sample


def test_blocks_of_the_sample_are_apart_and_whole(era5):
    blocks = {name: open_split(era5, name, rollout=1) for name in ("train", "validation", "test")}
    days = {name: np.unique(block.dates_s // 86400).tolist() for name, block in blocks.items()}
    first = 20423  # 2025-12-01
    assert days == {
        "train": list(range(first, first + 21)),
        "validation": list(range(first + 21, first + 25)),
        "test": list(range(first + 25, first + 31)),
    }
    assert {name: len(block) for name, block in blocks.items()} == {"train": 82, "validation": 14, "test": 22}
    assert all(block.num_dropped == 0 for block in blocks.values())


def test_sample_is_what_the_zarr_holds(era5):
    test = open_split(era5, "test", rollout=2)
    batch = test[3]
    data = raw_sample()["data"][100 + 3 : 100 + 7]
    assert batch.fields.shape == (4, 1, 10512, 10)
    np.testing.assert_array_equal(batch.fields.numpy(), data.transpose(0, 2, 3, 1))
    assert np.datetime64(int(batch.dates), "s") == np.datetime64("2025-12-27T00:00:00")


def test_statistics_are_of_the_training_block(era5):
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


def test_sample_names_no_machine():
    attributes = (SAMPLE_DIRECTORY / "era5-msl-2025-12-2p5.zarr" / ".zattrs").read_text()
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/work|/mnt|://)', attributes)
    assert json.loads(attributes)["licence"] == "CC-BY-4.0"
    assert "CC-BY-4.0" in (SAMPLE_DIRECTORY / "README.md").read_text()
    assert (SAMPLE_DIRECTORY / "recipe.yaml").exists()


# The option language


def test_options_pass_through(era5):
    era5.options = {"select": ["msl", "insolation"], "frequency": "12h", "start": "2025-12-03"}
    era5.forcing = ["insolation"]
    train = open_split(era5, "train", rollout=1)
    assert train.spec().variables == ("msl", "insolation") and train.spec().frequency_s == 43200
    assert train.dates_s[0] == np.datetime64("2025-12-03", "s").astype(int)
    np.testing.assert_array_equal(
        train[0].fields[:, 0, :, 0].numpy(), raw_sample()["data"][8:14:2, 5, 0], "msl every 12 hours from 3 December"
    )


def test_nested_description_with_a_shipped_dataset(era5):
    era5.dataset = {"join": [{"dataset": SAMPLE, "select": ["msl"]}, {"dataset": SAMPLE, "select": ["cos_latitude"]}]}
    era5.forcing = ["cos_latitude"]
    assert open_split(era5, "train", rollout=1).spec().variables == ("msl", "cos_latitude")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"dataset": "/nowhere.zarr"}, "data.dataset", "/nowhere.zarr"),
        ({"dataset": None}, "data.dataset", "data.dataset=/path"),
        ({"dataset": "sample:era5"}, "data.dataset", SAMPLE),
        ({"dataset": "/nowhere.zarr", "options": {"select": ["msl"]}}, "data.dataset", "/nowhere.zarr"),
        ({"options": {"select": ["mls"]}}, "data.options.select", "nearest: msl"),
        ({"options": {"drop": ["mls"]}}, "data.options.drop", "nearest: msl"),
        ({"options": {"frequenzy": "6h"}}, "data.options", "frequenzy"),
        ({"options": {"skip_missing_dates": True}}, "data.options.skip_missing_dates", "left out anyway"),
        ({"forcing": ["insolatoin"]}, "data.forcing", "nearest: insolation"),
        ({"options": {"select": ["insolation"]}, "forcing": ["insolation"]}, "data.forcing", "at least one"),
        ({"train": SplitConfig("2025-12-20", "2025-12-10")}, "data.train", "2025-12-31"),
        ({"train": SplitConfig("2025-12-20T00:00:00", "2025-12-20T06:00:00")}, "data.train", "2 states"),
        ({"train": SplitConfig("tomorrow", None)}, "data.train", "tomorrow"),
        ({"kind": "grib"}, "data.kind", "anemoi, synthetic"),
    ],
)
def test_errors_name_key_value_and_fix(era5, changes, key, words):
    for name, value in changes.items():
        setattr(era5, name, value)
    with pytest.raises(ConfigError) as raised:
        open_split(era5, "train", rollout=1)
    assert raised.value.key == key
    assert words in str(raised.value)


def test_unknown_split(era5):
    with pytest.raises(ConfigError, match="nearest: train"):
        open_split(era5, "trian", rollout=1)


def test_opening_leaves_no_process_behind():
    """In a fresh interpreter: anemoi-datasets would fork a child that holds a rank's sockets."""
    script = f"""if True:
        import multiprocessing, threading
        from anemoi_dist.data.anemoi import open_anemoi
        open_anemoi({SAMPLE!r})
        print(multiprocessing.active_children(), threading.active_count())
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "1"]


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


@given(
    steps=st.lists(st.sampled_from([6, 6, 6, 12]), min_size=0, max_size=30),
    missing=st.sets(st.integers(0, 30), max_size=5),
    window=st.integers(1, 6),
)
def test_window_starts_equal_a_plain_search(steps, missing, window):
    dates = np.cumsum([0, *steps])
    missing = {index for index in missing if index < len(dates)}
    expected = [
        start
        for start in range(len(dates) - window + 1)
        if not missing & set(range(start, start + window))
        and all(dates[i + 1] - dates[i] == 6 for i in range(start, start + window - 1))
    ]
    assert window_starts(dates, missing, window=window, frequency_s=6).tolist() == expected


def test_block_without_two_consecutive_states_is_refused():
    with pytest.raises(ConfigError, match="has 20 states and no 3 consecutive ones"):
        noise(set_missing_dates=list(range(0, 20, 2)))


# Statistics


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


@given(count=st.integers(1, 2000), at_most=st.none() | st.integers(8, 300), day=st.sampled_from([1, 2, 4, 8, 24]))
def test_evenly_spaced_covers_the_times_of_day(count, at_most, day):
    picked = evenly_spaced(count, at_most=at_most, frequency_s=86400 // day)
    assert len(picked) == count if at_most is None or at_most >= count else len(picked) <= at_most
    assert len(set(np.diff(picked).tolist())) <= 1
    if len(picked) >= day:
        assert len(np.unique(picked % day)) == day


def test_tendency_is_estimated_from_bounded_reads(monkeypatch):
    monkeypatch.setattr("anemoi_dist.data.fields.MAX_TENDENCY_PAIRS", 7)
    fields = Recorder(open_anemoi(SAMPLE, select=["msl"]))
    dataset = WeatherDataset(fields, train=fields, multistep_input=1, rollout=1)
    assert 200 < dataset.spec().tendency_stdev[0] < 300
    assert len(fields.read) <= 14
    assert len({index % 4 for index in fields.read}) == 4


def test_data_config_default_is_refused_with_its_key():
    with pytest.raises(ConfigError, match=r"data\.dataset=None"):
        open_split(DataConfig(kind="anemoi"), "train", rollout=1)


def test_frequency_is_a_timedelta():
    assert open_anemoi(SAMPLE).frequency == timedelta(hours=6)
