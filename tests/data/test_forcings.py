from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from anemoi_dist.config.schema import DataConfig, SplitConfig
from anemoi_dist.data.anemoi import open_anemoi, open_split
from anemoi_dist.data.batch import DataSpec
from anemoi_dist.data.fields import seconds
from anemoi_dist.data.forcings import initial_states
from anemoi_dist.errors import ConfigError

SAMPLE = "sample:era5-msl-2025-12-2p5"
GIVEN = ("cos_latitude", "cos_local_time", "sin_longitude", "insolation", "cos_julian_day")


@dataclass
class Ending:
    """A dataset that ends earlier than another, with gaps where it is told."""

    whole: Any
    length: int
    missing: frozenset[int] = frozenset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @property
    def dates(self) -> np.ndarray:
        return self.whole.dates[: self.length]

    def __getitem__(self, index: slice) -> np.ndarray:
        assert index.stop <= self.length, "read after its end"
        return self.whole[index]


@pytest.fixture(scope="module")
def whole() -> Any:
    return open_anemoi(SAMPLE, select=[*GIVEN, "msl"])


@pytest.fixture(scope="module")
def spec() -> DataSpec:
    config = DataConfig(
        kind="anemoi",
        dataset=SAMPLE,
        options={"select": [*GIVEN, "msl"]},
        train=SplitConfig(end="2025-12-10"),
        validation=SplitConfig(),
        test=SplitConfig(),
        forcing=list(GIVEN),
        multistep_input=2,
    )
    return open_split(config, "train", rollout=1).spec()


def test_forcings_after_the_end_are_those_that_the_dataset_would_have(whole: Any, spec: DataSpec) -> None:
    start_s = int(seconds(whole.dates)[40])
    expected = initial_states(whole, spec, start_s=start_s, num_steps=9)
    computed = initial_states(Ending(whole, 41), spec, start_s=start_s, num_steps=9)
    assert expected.shape == (1, 2 + 8, 1, 73 * 144, len(spec.variables))
    np.testing.assert_allclose(computed, expected, atol=2e-6)
    pressure = spec.variables.index("msl")
    assert np.isnan(expected[0, 2:, ..., pressure]).all(), "what is to be forecast is not given away"
    np.testing.assert_array_equal(expected[0, :2, 0, :, pressure], whole[39:41][:, pressure, 0])


def test_a_gap_is_filled_as_what_comes_after_the_end(whole: Any, spec: DataSpec) -> None:
    start_s = int(seconds(whole.dates)[40])
    expected = initial_states(whole, spec, start_s=start_s, num_steps=4)
    with_gap = Ending(whole, len(whole), missing=frozenset({42}))
    np.testing.assert_allclose(initial_states(with_gap, spec, start_s=start_s, num_steps=4), expected, atol=2e-6)


@pytest.mark.parametrize("index", [0, 41, 43])
def test_input_states_must_be_there(whole: Any, spec: DataSpec, index: int) -> None:
    # The state before the first, a state after the end, and a state that is missing.
    cut = Ending(whole, 43 if index == 43 else 41, missing=frozenset({40}))
    with pytest.raises(ConfigError, match="is not a date of the dataset, or is missing in it") as raised:
        initial_states(cut, spec, start_s=int(seconds(whole.dates)[index]), num_steps=1)
    assert "2025-12-01T00:00:00 and" in str(raised.value)


def test_a_forcing_that_nobody_can_compute_is_named(whole: Any, spec: DataSpec) -> None:
    unknown = DataSpec(**{**spec.__dict__, "forcing": (*spec.forcing[1:], "msl")})
    with pytest.raises(ConfigError, match=r"data\.forcing='msl': is not in the dataset at 2025-12-11T06:00:00"):
        initial_states(Ending(whole, 41), unknown, start_s=int(seconds(whole.dates)[40]), num_steps=3)
