import json
import re
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest

from anemoi_dist.config.schema import DataConfig, SplitConfig
from anemoi_dist.data.anemoi import SAMPLE_DIRECTORY, open_anemoi, open_split
from anemoi_dist.errors import ConfigError

from .conftest import SAMPLE, raw_sample

# The sample


def test_splits_of_the_sample_are_apart_and_whole(era5):
    splits = {name: open_split(era5, name, rollout=1) for name in ("train", "validation", "test")}
    days = {name: np.unique(part.dates_s // 86400).tolist() for name, part in splits.items()}
    first = 20423  # 2025-12-01
    assert days == {
        "train": list(range(first, first + 21)),
        "validation": list(range(first + 21, first + 25)),
        "test": list(range(first + 25, first + 31)),
    }
    assert {name: len(part) for name, part in splits.items()} == {"train": 82, "validation": 14, "test": 22}
    assert all(part.num_dropped == 0 for part in splits.values())


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


def test_data_config_default_is_refused_with_its_key():
    with pytest.raises(ConfigError, match=r"data\.dataset=None"):
        open_split(DataConfig(kind="anemoi"), "train", rollout=1)


def test_frequency_is_a_timedelta():
    assert open_anemoi(SAMPLE).frequency == timedelta(hours=6)
