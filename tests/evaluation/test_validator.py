import json

import numpy as np
import pytest
import torch
from data.conftest import MSL, load

from anemoi_dist.data.anemoi import open_split
from anemoi_dist.errors import ConfigError
from anemoi_dist.evaluation.baselines import Baselines
from anemoi_dist.evaluation.summary import Score, format_table
from anemoi_dist.evaluation.validator import Validator, save_forecast_maps


def validator(split="test", *, name="era5_sample", leads=(1, 2, 4), rollout=None, **arguments) -> Validator:
    data = load(name)
    train = open_split(data, "train", rollout=1)
    dataset = open_split(data, split, rollout=rollout or max(leads))
    baselines = Baselines.fit(train)
    return Validator(dataset, baselines=baselines, lead_steps=leads, **arguments)


def noisy_persistence(batch, rollout):
    """A forecast that depends on the sample alone, whatever batch it comes in."""
    last = batch.fields[:, 1:2][..., [MSL]].expand(-1, rollout, -1, -1, -1)
    noise = torch.sin(torch.arange(last.shape[3]) + batch.dates.view(-1, 1) % 1000)
    return last + 100 * noise[:, None, None, :, None]


def by_key(scores: list[Score]) -> dict[tuple[str, int], Score]:
    return {(score.forecast, score.lead_s): score for score in scores}


@pytest.fixture(scope="module")
def scores() -> list[Score]:
    return validator(batch_size=4).run(noisy_persistence)


def test_scores_equal_a_plain_computation(scores):
    check = validator()
    dataset, weights = check.dataset, np.cos(np.deg2rad(check.spec.latitudes))
    climatology = check.baselines.climatology[0, :, 0].double().numpy()
    for lead in (1, 2, 4):
        squared, correlations = [], []
        for index in range(len(dataset)):
            fields, date = dataset[index]
            truth = fields[1 + lead, 0, :, MSL].double().numpy()
            noise = np.sin(np.arange(len(truth)) + int(date) % 1000)
            forecast = fields[1, 0, :, MSL].double().numpy() + 100 * noise
            squared.append(np.average((forecast - truth) ** 2, weights=weights))
            f, t = forecast - climatology, truth - climatology
            cov = np.average(f * t, weights=weights)
            correlations.append(cov / np.sqrt(np.average(f**2, weights=weights) * np.average(t**2, weights=weights)))
        score = by_key(scores)["model", lead * 21600]
        assert score.rmse == pytest.approx(np.sqrt(np.mean(squared)), rel=1e-5)
        assert score.acc == pytest.approx(np.mean(correlations), rel=1e-5)


def test_baselines_on_the_test_split_are_as_known():
    """Persistence 258 Pa and tide + damped tendency 171 Pa at 6 hours are known from an independent computation."""
    known = by_key(validator(leads=(1,), batch_size=8).run(noisy_persistence))
    assert known["persistence", 21600].rmse == pytest.approx(258, abs=1)
    assert known["tide_tendency", 21600].rmse == pytest.approx(171, abs=2)
    assert known["climatology", 21600].rmse == pytest.approx(941, abs=2)
    assert known["climatology", 21600].acc is None
    assert 0.95 < known["persistence", 21600].acc < known["tide_tendency", 21600].acc < 1


def test_perfect_forecast():
    check = validator("validation", leads=(1, 2))

    def truth(batch, rollout):
        return batch.fields[:, 2 : 2 + rollout][..., [MSL]]

    for score in check.run(truth)[:2]:
        assert score.forecast == "model" and score.rmse == 0
        assert score.acc == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 5, 19, 32])
def test_batch_size_does_not_matter(scores, batch_size):
    again = validator(batch_size=batch_size).run(noisy_persistence)
    assert len(again) == len(scores) == 12
    for mine, expected in zip(again, scores, strict=True):
        assert mine.rmse == pytest.approx(expected.rmse, rel=1e-6)
        assert mine.acc is None or mine.acc == pytest.approx(expected.acc, rel=1e-6)


def run_on_rank(world, batch_size, max_samples):
    calls = 0

    def predict(batch, rollout):
        nonlocal calls
        calls += 1
        return noisy_persistence(batch, rollout)

    check = validator(batch_size=batch_size, max_samples=max_samples, world=world)
    return check.run(predict), calls


@pytest.mark.parametrize(("batch_size", "max_samples"), [(4, None), (2, 1)])
def test_ranks_agree_and_call_predict_equally_often(ranks, batch_size, max_samples):
    (first, first_calls), (second, second_calls) = ranks(2).run(run_on_rank, batch_size, max_samples)
    assert first == second and first_calls == second_calls
    alone = validator(batch_size=batch_size, max_samples=max_samples).run(noisy_persistence)
    for mine, expected in zip(first, alone, strict=True):
        assert mine.rmse == pytest.approx(expected.rmse, rel=1e-6)


def test_baselines_are_computed_once(monkeypatch):
    calls = []
    original = Baselines.forecast

    def counting(self, *args, **kwargs):
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Baselines, "forecast", counting)
    check = validator(batch_size=8)
    first = check.run(noisy_persistence)
    num_calls = len(calls)
    assert check.run(noisy_persistence) == first
    assert num_calls == len(calls) == 3 * check.num_calls


def test_max_samples_are_spread_over_split_and_day():
    check = validator(max_samples=8)
    assert check.samples.tolist() == [0, 3, 6, 9, 12, 15, 18]
    hours = {int(check.dataset[i].dates) // 3600 % 24 for i in check.samples}
    assert hours == {0, 6, 12, 18}


def test_several_variables_and_synthetic_data():
    check = validator(name="synthetic", leads=(1, 3), max_samples=9, batch_size=3)
    scores = check.run(lambda batch, rollout: batch.fields[:, 1:2].expand(-1, rollout, -1, -1, -1))
    found = {(s.forecast, s.variable, s.lead_s): s for s in scores}
    assert len(found) == 4 * 2 * 2
    for variable in ("wave_0", "wave_1"):
        for lead_s in (21600, 64800):
            model, persistence = (found[name, variable, lead_s] for name in ("model", "persistence"))
            assert model.rmse == persistence.rmse > 0 and model.acc == persistence.acc


def test_leads_beyond_the_dataset_are_refused():
    with pytest.raises(ConfigError, match="rollout of 2"):
        validator(leads=(1, 4), rollout=2)


def test_score_fits_an_event(scores):
    entry = json.loads(json.dumps(scores[0].as_dict(), allow_nan=False))
    assert set(entry) == {"forecast", "variable", "lead_s", "rmse", "acc"} and entry["lead_s"] == 21600


def test_table_shows_every_score(scores):
    table = format_table(scores)
    lines = table.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [["msl", lead, "h"] for lead in ("6", "12", "24")]
    assert max(len(line) for line in lines) <= 120
    persistence = by_key(scores)["persistence", 21600]
    assert f"{persistence.rmse:.4g}" in lines[2] and f"{persistence.acc:.3f}" in lines[2]
    assert lines[1].split() == ["variable", "lead", *["model", "persistence", "climatology", "tide_tendency"] * 2]


def test_forecast_maps(tmp_path):
    check = validator("validation", leads=(1, 4))
    path = tmp_path / "report" / "forecast.npz"
    save_forecast_maps(path, maps=check.forecast_maps(noisy_persistence))
    with np.load(path, allow_pickle=False) as maps:
        middle = len(check.dataset) // 2
        fields, date = check.dataset[middle]
        assert str(maps["variable"]) == "msl" and maps["lead_s"].tolist() == [21600, 86400]
        assert int(maps["date"]) == int(date)
        assert maps["latitudes"][[0, -1]].tolist() == [90, -90] and maps["longitudes"].shape == (144,)
        np.testing.assert_array_equal(maps["truth"], fields[[2, 5], 0, :, MSL].reshape(2, 73, 144))
        np.testing.assert_array_equal(maps["persistence"][1], fields[1, 0, :, MSL].reshape(73, 144))
        assert maps["forecast"].shape == (2, 73, 144) and np.abs(maps["forecast"] - maps["persistence"]).max() > 50
    assert [entry.name for entry in path.parent.iterdir()] == ["forecast.npz"]
