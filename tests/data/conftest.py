from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anemoi_dist.config import DataConfig

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
    return load("era5_sample")


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
