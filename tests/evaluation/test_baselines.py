import numpy as np
import pytest
import torch
from data.conftest import MSL, load, load_waves

from anemoi_dist.data.anemoi import open_split
from anemoi_dist.data.batch import Batch
from anemoi_dist.data.dataset import WeatherDataset
from anemoi_dist.evaluation.baselines import BASELINES, Baselines, latitude_weights, time_of_day


def sample_batch(dataset: WeatherDataset, index: int) -> Batch:
    return Batch(*(part.unsqueeze(0) for part in dataset[index]))


@pytest.fixture(scope="module")
def era5() -> tuple[WeatherDataset, Baselines]:
    train = open_split(load("era5_sample"), "train", rollout=1)
    return train, Baselines.fit(train)


def test_climatology_is_the_mean_of_the_training_split(era5):
    train, baselines = era5
    states = np.stack([train[i].fields[1, 0, :, MSL].numpy() for i in range(len(train))]).astype(np.float64)
    np.testing.assert_allclose(baselines.climatology[0, :, 0], states.mean(0), rtol=1e-6)


def test_tide_is_the_mean_change_at_that_time_of_day(era5):
    train, baselines = era5
    changes = {hour: [] for hour in range(4)}
    for i in range(len(train)):
        fields, date = train[i]
        changes[int(date) // 21600 % 4].append((fields[2] - fields[1])[0, :, MSL].numpy().astype(np.float64))
    for hour, values in changes.items():
        np.testing.assert_allclose(baselines.tide[hour, 0, :, 0], np.mean(values, 0), atol=1e-2)


def test_damping_is_the_weighted_least_squares_slope(era5):
    train, baselines = era5
    fields = torch.stack([train[i].fields[:, 0, :, MSL] for i in range(len(train))]).double().numpy()
    hours = np.array([int(train[i].dates) // 21600 % 4 for i in range(len(train))])
    now, before = fields[:, 2] - fields[:, 1], fields[:, 1] - fields[:, 0]
    for hour in range(4):
        now[hours == hour] -= now[hours == hour].mean(0)
        before[hours == hour] -= before[hours == hour].mean(0)
    weights = np.cos(np.deg2rad(train.spec().latitudes))
    slope = (weights * now * before).sum() / (weights * before**2).sum()
    assert float(baselines.damping) == pytest.approx(slope, rel=1e-5)
    assert 0.5 < slope < 0.7


def test_tide_tendency_iterates_over_steps(era5):
    train, baselines = era5
    batch = sample_batch(train, 6)
    forecast = baselines.forecast("tide_tendency", batch, rollout=3)
    previous, state = batch.fields[:, 0][..., [MSL]], batch.fields[:, 1][..., [MSL]]
    hour, damping = int(batch.dates) // 21600 % 4, float(baselines.damping)
    departure = state - previous - baselines.tide[(hour - 1) % 4]
    for step in range(3):
        departure = damping * departure
        state = state + baselines.tide[(hour + step) % 4] + departure
        torch.testing.assert_close(forecast[:, step], state)


def test_persistence_and_climatology_do_not_move(era5):
    train, baselines = era5
    batch = sample_batch(train, 0)
    for step in range(3):
        persistence = baselines.forecast("persistence", batch, rollout=3)
        torch.testing.assert_close(persistence[:, step], batch.fields[:, 1][..., [MSL]])
        climatology = baselines.forecast("climatology", batch, rollout=3)
        torch.testing.assert_close(climatology[0, step], baselines.climatology)


def test_baselines_read_no_truth(era5):
    train, baselines = era5
    batch = sample_batch(train, 0)
    blind = Batch(batch.fields.clone(), batch.dates)
    blind.fields[:, 2:] = torch.nan
    for name in BASELINES:
        torch.testing.assert_close(
            baselines.forecast(name, blind, rollout=2), baselines.forecast(name, batch, rollout=2)
        )


def test_a_steady_oscillation_is_forecast_well():
    """The mean over time of day of a wave is about nothing, so the damped tendency has to do the work."""
    train = open_split(load_waves(), "train", rollout=1)
    baselines = Baselines.fit(train)
    errors = {}
    for name in ("persistence", "tide_tendency"):
        batches = [sample_batch(train, i) for i in range(0, 100, 10)]
        errors[name] = np.mean(
            [(baselines.forecast(name, b, rollout=1)[:, 0] - b.fields[:, 2]).square().mean() for b in batches]
        )
    assert errors["tide_tendency"] < 0.15 * errors["persistence"]


def test_one_input_state_leaves_the_tide_alone(era5):
    data = load("era5_sample", "multistep_input=1")
    train = open_split(data, "train", rollout=1)
    baselines = Baselines.fit(train)
    assert float(baselines.damping) == 0
    batch = sample_batch(train, 3)
    hour = int(batch.dates) // 21600 % 4
    expected = batch.fields[:, 0][..., [MSL]] + baselines.tide[hour]
    torch.testing.assert_close(baselines.forecast("tide_tendency", batch, rollout=1)[:, 0], expected)


def test_reads_are_bounded_and_cover_the_day():
    train = open_split(load_waves(), "train", rollout=1)
    read = []
    original = WeatherDataset.__getitem__

    class Counting(WeatherDataset):
        def __getitem__(self, index):
            read.append(index)
            return original(self, index)

    train.__class__ = Counting
    Baselines.fit(train, max_samples=20)
    assert len(read) <= 20 and len({index % 4 for index in read}) == 4


def fit_on_rank(world):
    train = open_split(load("era5_sample"), "train", rollout=1)
    baselines = Baselines.fit(train, world=world)
    return baselines.climatology.numpy(), baselines.tide.numpy(), baselines.damping.numpy()


def test_ranks_share_the_work_and_agree(era5, ranks):
    _, alone = era5
    results = ranks(2).run(fit_on_rank)
    for mine, other, expected in zip(*results, (alone.climatology, alone.tide, alone.damping), strict=True):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-4)


def test_latitude_weights():
    weights = latitude_weights(np.array([90.0, 60.0, 0.0, -60.0, -90.0]))
    np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.25, 0], atol=1e-15)


def test_time_of_day():
    dates = torch.tensor([0, 3600, 21600, 86400 + 64800, -3600])
    assert time_of_day(dates, frequency_s=21600).tolist() == [0, 0, 1, 3, 3]
    assert time_of_day(dates, frequency_s=3600).tolist() == [0, 1, 6, 18, 23]


def test_unknown_baseline(era5):
    train, baselines = era5
    with pytest.raises(ValueError, match="persistence, climatology, tide_tendency"):
        baselines.forecast("tide", sample_batch(train, 0), rollout=1)
