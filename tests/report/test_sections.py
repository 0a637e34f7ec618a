import numpy as np
import pytest
from support.recorded import scores, write_forecast

from anemoi_dist.report.sections import curves, lead_label, maps, named_scores, restarts, skill, unit_of
from anemoi_dist.run.events import read_events


def test_every_recorded_value_is_a_curve(finished_run):
    found = curves(read_events(finished_run.events_file))
    assert [item.title for item in found] == ["Loss", "Gradient norm", "Learning rate", "alpha", "beta3", "Speed"]
    assert all("resumed" in item.svg and "update skipped" in item.svg for item in found)
    assert found[0].note.endswith("log scale")


def test_what_was_not_recorded_is_no_curve():
    events = [{"event": "step", "step": step, "loss": 1.0, "grad_norm": None, "lr": 0.0} for step in (1, 2)]
    assert [item.title for item in curves(events)] == ["Loss", "Learning rate"]
    assert curves([]) == []


def test_restarts_are_the_steps_that_attempts_went_on_from(finished_run):
    assert restarts(read_events(finished_run.events_file)) == [50]


def test_the_table_is_that_of_the_test_split_in_units_a_reader_knows(finished_run):
    found = skill(read_events(finished_run.events_file))
    assert (found.split, found.step, found.num_won, found.num_compared) == ("test", 100, 2, 2)
    (table,) = found.tables
    assert (table.variable, table.unit, table.leads) == ("msl", "hPa", ["+6 h", "+12 h"])
    assert [row.name for row in table.rows] == ["Model", "Persistence", "Climatology", "Tide + damped tendency"]
    assert [row.cells[0].rmse for row in table.rows] == ["1.27", "2.58", "9.03", "1.71"]
    assert [row.cells[0].acc for row in table.rows] == ["0.980", "0.930", "–", "0.960"]
    assert [row.cells[1].best_rmse for row in table.rows] == [True, False, False, False]
    assert table.gains == pytest.approx([127 / 171 - 1] * 2)
    assert len(found.charts) == 3


def test_a_baseline_that_wins_is_marked_and_counted():
    found = skill([{"event": "validation", "step": 5, "split": "validation", "scores": scores(180.0)}])
    assert (found.split, found.num_won, found.num_compared) == ("validation", 0, 2)
    assert [row.cells[0].best_rmse for row in found.tables[0].rows] == [False, False, False, True]


def test_many_variables_are_all_in_tables_and_some_in_charts():
    names = ("msl", "2t", "q_850", "z_500", "foo", "bar")
    every = [score for name in names for score in scores(100.0, variable=name)]
    found = skill([{"event": "validation", "step": 5, "split": "validation", "scores": every}])
    assert [table.variable for table in found.tables] == list(names)
    assert found.num_uncharted == 2


def test_scores_of_the_model_alone_compare_with_nothing():
    alone = [score for score in scores(100.0) if score["forecast"] == "model"]
    found = skill([{"event": "validation", "step": 5, "split": "validation", "scores": alone}])
    assert found.num_compared == 0
    assert found.tables[0].gains == [None, None]


def test_nothing_scored_is_none():
    assert skill([{"event": "step", "step": 1}]) is None


def test_maps_of_forecast_truth_and_error_at_each_lead(run):
    write_forecast(run)
    found = maps(run.report_dir / "forecast.npz")
    assert (found.variable, found.date) == ("msl", "2025-12-26 12:00 UTC")
    assert [lead.label for lead in found.leads] == ["+6 h", "+12 h"]
    assert "Forecast +6 h, valid 2025-12-26 18:00 UTC" in found.leads[0].panels[0]
    assert "Truth +12 h, valid 2025-12-27 00:00 UTC" in found.leads[1].panels[1]
    assert "forecast minus truth" in found.leads[0].panels[2]
    # 100 Pa times a wave of latitude and longitude whose weighted mean square is 1/3.
    assert float(found.leads[0].rmse.split()[0]) == pytest.approx(3**-0.5, abs=0.02)
    assert float(found.leads[0].persistence.split()[0]) == pytest.approx(3 * 3**-0.5, abs=0.05)


def test_coordinates_of_each_cell_are_as_good_as_axes(run):
    write_forecast(run, num_leads=1)
    expected = maps(run.report_dir / "forecast.npz")
    latitudes, longitudes = np.meshgrid(np.linspace(90, -90, 13), np.arange(0.0, 360.0, 15.0), indexing="ij")
    write_forecast(run, num_leads=1, latitudes=latitudes.ravel(), longitudes=longitudes.ravel())
    assert maps(run.report_dir / "forecast.npz") == expected


def test_a_forecast_that_cannot_be_drawn_is_a_sentence(run):
    path = run.report_dir / "forecast.npz"
    assert "No forecast" in maps(path).missing
    path.write_bytes(b"PK\x03\x04 torn")
    assert "cannot be drawn" in maps(path).missing
    write_forecast(run, truth=np.zeros((2, 312)))
    assert "not (lead, latitude, longitude)" in maps(path).missing
    write_forecast(run, latitudes=np.zeros(3))
    assert "3 latitudes and 24 longitudes do not fit" in maps(path).missing


@pytest.mark.parametrize(
    ("variable", "symbol"),
    [("msl", "hPa"), ("t_850", "K"), ("10u", "m/s"), ("q_500", "g/kg"), ("xyz", "dataset's unit")],
)
def test_units(variable, symbol):
    assert unit_of(variable).symbol == symbol


def test_lead_times():
    assert [lead_label(seconds) for seconds in (1800, 21600, 864000)] == ["+0.5 h", "+6 h", "+240 h"]


def test_scores_with_a_name_are_a_table_and_curves():
    events = [
        {"event": "validation", "step": step, "split": split, "scores": [{"name": "loss", "value": value}]}
        for step, split, value in ((10, "validation", 2.0), (20, "validation", None), (20, "test", 0.5))
    ]
    found = named_scores(events)
    assert (found.split, found.step, found.rows) == ("test", 20, [("loss", "0.5")])
    assert [card.title for card in found.charts] == ["loss"]
    assert skill(events) is None and named_scores([]) is None
