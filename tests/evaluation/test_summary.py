"""Scores reduced to names and numbers."""

import pytest

from anemoi_dist.evaluation.summary import Score, metrics


def test_a_metric_is_named_by_kind_variable_forecast_and_hours():
    scores = [Score("model", "msl", 21600, 127.5, 0.98), Score("climatology", "msl", 43200, 900.0, None)]
    assert metrics(scores) == {
        "rmse/msl/model/6h": pytest.approx(127.5),
        "acc/msl/model/6h": pytest.approx(0.98),
        "rmse/msl/climatology/12h": pytest.approx(900.0),
    }
