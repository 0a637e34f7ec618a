from pathlib import Path

import pytest
import zarr
from omegaconf import OmegaConf

from anemoi_dist.config.schema import DataConfig
from anemoi_dist.data.anemoi import SAMPLE_DIRECTORY

SAMPLE = "sample:era5-msl-2025-12-2p5"
#: Position of mean sea level pressure among the variables that `data=era5_sample` opens.
MSL = 4
#: Given to anemoi-datasets: a dataset without a file, four states a day.
NOISE = {
    "synthetic": {
        "geography": {"bbox": [90, 0, -90, 315], "resolution": 45},
        "variables": ["a", "b", {"name": "c", "values": 3.0}],
        "dates": {"start": "2020-01-01", "end": "2020-01-05T18:00:00", "frequency": "6h"},
        "layout": "gridded",
    }
}
CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def load(name: str, *overrides: str) -> DataConfig:
    """Load one of the shipped ``data`` configurations."""
    merged = OmegaConf.merge(
        OmegaConf.structured(DataConfig),
        OmegaConf.load(CONFIGS / f"{name}.yaml"),
        OmegaConf.from_dotlist(list(overrides)),
    )
    return OmegaConf.to_object(merged)


@pytest.fixture
def era5() -> DataConfig:
    """The sample with all of its variables; the shipped configuration leaves the day of the year out."""
    data = load("era5_sample")
    assert data.options == {"drop": ["cos_julian_day", "sin_julian_day"]}
    data.forcing += data.options.pop("drop")
    return data


def load_waves() -> DataConfig:
    """Synthetic data of 1 January to 9 April 2000 on a tiny grid."""
    return load(
        "synthetic",
        "dataset.field_shape=[6,8]",
        "dataset.num_dates=400",
        "train.end=2000-03-01",
        "validation.start=2000-03-02",
        "validation.end=2000-03-31",
        "test.start=2000-04-01",
    )


@pytest.fixture
def waves() -> DataConfig:
    return load_waves()


def raw_sample():
    """Return the shipped zarr as zarr sees it."""
    return zarr.open(str(SAMPLE_DIRECTORY / "era5-msl-2025-12-2p5.zarr"), mode="r")


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
