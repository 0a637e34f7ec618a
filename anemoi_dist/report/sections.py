"""Sections of a report that hold figures, made from events and arrays. No torch."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anemoi_dist.evaluation.summary import Score
from anemoi_dist.report.figures import Chart, Curve, Field, draw_chart, draw_map
from anemoi_dist.run.events import Event, latest_by_step

FORECASTS = {
    "model": "Model",
    "persistence": "Persistence",
    "climatology": "Climatology",
    "tide_tendency": "Tide + damped tendency",
}
# A dataset of a hundred variables would make a page of hundreds of charts; the tables have every variable.
MAX_CHARTED_VARIABLES = 4
MAX_CHARTED_LEADS = 4


class Unit(NamedTuple):
    """Unit in which a variable is shown: its values times ``factor``, followed by ``symbol``."""

    symbol: str
    factor: float = 1.0


@dataclass(frozen=True)
class Card:
    """One figure with its title and a note."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class SkillCell:
    """RMSE and ACC of one forecast at one lead time, and whether they are the best of their column."""

    rmse: str
    acc: str
    best_rmse: bool
    best_acc: bool


@dataclass(frozen=True)
class SkillRow:
    """One forecast: the model or a baseline, at all lead times."""

    name: str
    style: int
    cells: list[SkillCell]


@dataclass(frozen=True)
class SkillTable:
    """Scores of one variable.

    Attributes
    ----------
    variable, unit : str
        Its name, and the symbol of its unit.
    leads : list[str]
        Lead times, as labels of the columns.
    rows : list[SkillRow]
        The model, then the baselines.
    gains : list[float or None]
        For each lead time the model's RMSE relative to the best baseline's, less 1; None without either.
    first_rmse : str or None
        The model's RMSE at the first lead time.
    """

    variable: str
    unit: str
    leads: list[str]
    rows: list[SkillRow]
    gains: list[float | None]
    first_rmse: str | None


@dataclass(frozen=True)
class Skill:
    """Scores after ``step`` on ``split``: tables of all variables, charts of some.

    Attributes
    ----------
    num_compared, num_won : int
        Combinations of variable and lead time with a baseline, and those in which the model beats all baselines.
    num_uncharted : int
        Variables without a chart.
    """

    split: str
    step: int
    tables: list[SkillTable]
    charts: list[Card]
    num_compared: int
    num_won: int
    num_uncharted: int


@dataclass(frozen=True)
class LeadMaps:
    """Maps of one lead time as SVG (forecast, truth, error), with the RMSE of the forecast and of persistence."""

    label: str
    panels: list[str]
    rmse: str
    persistence: str


@dataclass(frozen=True)
class ForecastMaps:
    """Maps of one forecast, or ``missing``: a sentence that says why there are none."""

    variable: str = ""
    date: str = ""
    leads: Sequence[LeadMaps] = ()
    missing: str = ""


_UNITS = {
    **dict.fromkeys(("msl", "sp"), Unit("hPa", 0.01)),
    **dict.fromkeys(("t", "2t", "2d", "skt", "sst"), Unit("K")),
    **dict.fromkeys(("u", "v", "10u", "10v", "100u", "100v"), Unit("m/s")),
    "q": Unit("g/kg", 1000.0),
    "tp": Unit("mm", 1000.0),
    "z": Unit("m²/s²"),
}


def unit_of(variable: str) -> Unit:
    """Return the unit of a variable by ECMWF's short name, with or without a level: ``msl``, ``t_850``."""
    return _UNITS.get(variable.split("_")[0], Unit("dataset's unit"))


def lead_label(lead_s: float) -> str:
    """Return ``+6 h``."""
    return f"+{lead_s / 3600:g} h"


def date_label(unix_s: float) -> str:
    """Return ``2025-12-26 06:00 UTC``."""
    return datetime.fromtimestamp(unix_s, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")


def restarts(events: Sequence[Event]) -> list[int]:
    """Return the steps that attempts after the first one resumed from."""
    starts = [event for event in events if event["event"] == "start"]
    return [event.get("resumed_from_step") or 0 for event in starts[1:]]


def curves(events: Sequence[Event]) -> list[Card]:
    """Return the training curves, one for each value that was recorded."""
    steps = latest_by_step(events, "step")
    resumed, skipped = sorted(set(restarts(events))), list(latest_by_step(events, "skipped_update"))
    wanted = (
        ("loss", "Loss", "as trained", "log", True),
        ("grad_norm", "Gradient norm", "global L2 norm, before clipping", "log", True),
        ("lr", "Learning rate", "of the first parameter group", "linear", False),
        ("alpha", "alpha", "weight of AdEMAMix's slow EMA", "linear", False),
        ("beta3", "beta3", "decay of AdEMAMix's slow EMA", "decay", False),
        ("samples_per_s", "Speed", "samples per second, over all ranks, moving window", "linear", False),
    )
    cards = []
    for key, title, note, scale, smooth in wanted:
        x, y = _series(steps, key)
        if not any(math.isfinite(value) for value in y):
            continue
        chart = Chart(
            name=f"curve-{key}",
            alt=f"{title} against optimizer step, from {_first(y):.4g} to {_first(y[::-1]):.4g}",
            curves=[Curve(title, x, y)],
            scale=_fitting_scale(scale, y),
            smooth=smooth and len(y) >= 25,  # the mean of a handful of values is no trend
            restarts=resumed,
            skipped=skipped,
        )
        if chart.scale == "log":
            note += ", log scale"
        cards.append(Card(title, note, draw_chart(chart)))
    return cards


def _series(steps: Mapping[int, Event], key: str) -> tuple[list[int], list[float]]:
    # Null stands for a value that was not finite: NaN leaves a gap in the curve.
    points = [(step, event[key]) for step, event in steps.items() if key in event]
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def _first(values: Sequence[float]) -> float:
    return next(value for value in values if math.isfinite(value))


@dataclass(frozen=True)
class NamedScores:
    """Scores that are one number each, as a task with losses and metrics of its own has them.

    Attributes
    ----------
    split : str
        The split of ``rows``, scored after ``step``.
    rows : list[tuple[str, str]]
        Name and value.
    charts : list[Card]
        The first of them during training, on the validation split.
    """

    split: str
    step: int
    rows: list[tuple[str, str]]
    charts: list[Card]


def named_scores(events: Sequence[Event]) -> NamedScores | None:
    """Return the last scores by name, those of the test split if there are any; None if none has been scored."""
    scored = [event for event in events if event["event"] == "validation" and _are_named(event)]
    if not scored:
        return None
    last = scored[-1]
    history = [event for event in scored if event["split"] == "validation"]
    charts: list[Card] = []
    for name in [score["name"] for score in last["scores"]][:MAX_CHARTED_VARIABLES]:
        points = {e["step"]: s["value"] for e in history for s in e["scores"] if s["name"] == name}
        x, y = list(points), [math.nan if value is None else float(value) for value in points.values()]
        if any(math.isfinite(value) for value in y):
            scale = _fitting_scale("log", y)
            chart = Chart(name=f"score-{len(charts)}", alt=f"{name} by step", curves=[Curve(name, x, y)], scale=scale)
            charts.append(Card(name, "validation split", draw_chart(chart)))
    rows = [(s["name"], "–" if s["value"] is None else f"{s['value']:.6g}") for s in last["scores"]]
    return NamedScores(last["split"], last["step"], rows, charts)


def _are_named(event: Event) -> bool:
    return bool(event["scores"]) and "name" in event["scores"][0]


def _fitting_scale(scale: str, values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    # A logarithmic axis over less than a factor of 5 has no two powers of ten to read it by.
    if scale == "log" and (min(known) <= 0 or max(known) / min(known) < 5):
        return "linear"
    if scale == "decay" and not 0 <= min(known) <= max(known) < 1:
        return "linear"
    return scale


def skill(events: Sequence[Event]) -> Skill | None:
    """Return tables and charts of forecast skill, or None if nothing has been scored.

    The tables show the last scores on the test split, or on the validation split until there are any.
    """
    validations = latest_by_step(events, "validation", split="validation")
    tests = latest_by_step(events, "validation", split="test")
    # The test split is scored once, at the end: until then the validation split is the best there is.
    scored = list((tests or validations).values())
    if not scored or _are_named(scored[-1]) or not scored[-1]["scores"]:
        return None
    split, step, scores = scored[-1]["split"], scored[-1]["step"], _scores(scored[-1])
    names = list(dict.fromkeys(score.variable for score in scores))
    tables = [_skill_table(name, scores) for name in names]
    comparisons = [gain for table in tables for gain in table.gains if gain is not None]
    history = {at: _scores(event) for at, event in validations.items()}
    charts = []
    for name in names[:MAX_CHARTED_VARIABLES]:
        charts += _skill_charts(name, scores, split, history)
    return Skill(
        split=split,
        step=step,
        tables=tables,
        charts=charts,
        num_compared=len(comparisons),
        num_won=sum(gain < 0 for gain in comparisons),
        num_uncharted=max(len(names) - MAX_CHARTED_VARIABLES, 0),
    )


def _scores(event: Event) -> list[Score]:
    """Decode the scores of a ``validation`` event."""
    # Null stands for a number that was not finite, which JSON cannot hold.
    return [
        Score(
            s["forecast"],
            s["variable"],
            lead_s=s["lead_s"],
            rmse=math.nan if s["rmse"] is None else s["rmse"],
            acc=s.get("acc"),
        )
        for s in event["scores"]
    ]


def _skill_table(variable: str, scores: Sequence[Score]) -> SkillTable:
    by_key = {(s.forecast, s.lead_s): s for s in scores if s.variable == variable}
    leads = sorted({lead for _, lead in by_key})
    forecasts = forecast_order({forecast for forecast, _ in by_key})
    unit = unit_of(variable)
    rmse = {key: s.rmse * unit.factor for key, s in by_key.items() if math.isfinite(s.rmse)}
    acc = {key: s.acc for key, s in by_key.items() if s.acc is not None}
    lowest = {lead: min((v for (_, at), v in rmse.items() if at == lead), default=None) for lead in leads}
    highest = {lead: max((v for (_, at), v in acc.items() if at == lead), default=None) for lead in leads}
    # One number of decimals for the whole table, so that its columns can be compared by eye.
    decimals = _decimals(min((value for value in rmse.values() if value > 0), default=1.0))

    def cell(forecast: str, lead: int) -> SkillCell:
        key = (forecast, lead)
        return SkillCell(
            rmse=f"{rmse[key]:.{decimals}f}" if key in rmse else "–",
            acc=f"{acc[key]:.3f}" if key in acc else "–",
            best_rmse=key in rmse and rmse[key] == lowest[lead],
            best_acc=key in acc and acc[key] == highest[lead],
        )

    return SkillTable(
        variable=variable,
        unit=unit.symbol,
        leads=[lead_label(lead) for lead in leads],
        rows=[
            SkillRow(forecast_name(name), forecast_style(name), [cell(name, lead) for lead in leads])
            for name in forecasts
        ],
        gains=[_gain(lead, rmse) for lead in leads],
        first_rmse=cell("model", leads[0]).rmse if ("model", leads[0]) in rmse else None,
    )


def _gain(lead: int, rmse: Mapping[tuple[str, int], float]) -> float | None:
    """Return the model's RMSE relative to the best baseline's, less 1; None if one of them is missing."""
    baselines = [value for (forecast, at), value in rmse.items() if at == lead and forecast != "model"]
    if ("model", lead) not in rmse or not baselines or min(baselines) <= 0:
        return None
    return rmse["model", lead] / min(baselines) - 1


def forecast_order(forecasts: set[str]) -> list[str]:
    """Return the names in the order of every table and legend: the model, its baselines, others."""
    return [name for name in FORECASTS if name in forecasts] + sorted(forecasts - set(FORECASTS))


def forecast_name(forecast: str) -> str:
    """Return the name that is shown to the reader."""
    return FORECASTS.get(forecast, forecast.replace("_", " "))


def forecast_style(forecast: str) -> int:
    """Return the number of the colour and marker that a forecast has everywhere on the page."""
    return list(FORECASTS).index(forecast) if forecast in FORECASTS else len(FORECASTS)


def _decimals(smallest: float) -> int:
    """Return the decimals that show three significant digits of ``smallest``."""
    return max(2 - math.floor(math.log10(smallest)), 0)


def _skill_charts(
    variable: str, scores: Sequence[Score], split: str, history: Mapping[int, Sequence[Score]]
) -> list[Card]:
    """Return charts of RMSE by lead time, and of RMSE during training from ``history`` (scores by step)."""
    unit = unit_of(variable)
    scores = [s for s in scores if s.variable == variable and math.isfinite(s.rmse)]
    leads = sorted({s.lead_s for s in scores})
    charts = []
    if len(leads) > 1:
        points: dict[str, list[tuple[float, float]]] = {}
        for s in sorted(scores, key=lambda s: s.lead_s):
            points.setdefault(s.forecast, []).append((s.lead_s / 3600, s.rmse * unit.factor))
        chart = Chart(
            name=f"lead-{variable}",
            alt=f"RMSE of {variable} against lead time for the model and its baselines, as in the table above",
            curves=_forecast_curves(points, marked=set(points)),
            x_label="lead time, h",
            scale="log",
            x_ticks=[lead / 3600 for lead in leads],
        )
        charts.append(Card(f"{variable}: RMSE by lead time", f"{unit.symbol}, {split} split", draw_chart(chart)))
    for lead in leads[:MAX_CHARTED_LEADS]:
        if svg := _training_chart(variable, lead, history, unit):
            title = f"{variable}: RMSE at {lead_label(lead)} during training"
            charts.append(Card(title, f"{unit.symbol}, validation split", svg))
    return charts


def _training_chart(variable: str, lead: int, history: Mapping[int, Sequence[Score]], unit: Unit) -> str | None:
    points: dict[str, list[tuple[float, float]]] = {}
    for step, scores in history.items():
        for s in scores:
            if s.variable == variable and s.lead_s == lead and math.isfinite(s.rmse):
                points.setdefault(s.forecast, []).append((step, s.rmse * unit.factor))
    if not points:
        return None
    return draw_chart(
        Chart(
            name=f"training-{variable}-{lead:g}",
            alt=f"RMSE of {variable} at {lead_label(lead)} on the validation split against optimizer step",
            # Baselines are constant: markers on them would only hide the model's.
            curves=_forecast_curves(points, marked={"model"}),
            scale="log",
        )
    )


def _forecast_curves(points: Mapping[str, Sequence[tuple[float, float]]], *, marked: set[str]) -> list[Curve]:
    """Return one curve for each forecast, in the order, name and style that it has everywhere on the page."""
    curves = []
    for forecast in forecast_order(set(points)):
        x, y = zip(*points[forecast], strict=True)
        curves.append(Curve(forecast_name(forecast), x, y, forecast_style(forecast), markers=forecast in marked))
    return curves


def maps(path: Path) -> ForecastMaps:
    """Return the maps of one forecast.

    Parameters
    ----------
    path : Path
        ``forecast.npz``: ``truth``, ``forecast``, ``persistence`` of shape (lead, latitude, longitude), ``lead_s``,
        ``latitudes``, ``longitudes``, ``date`` (Unix seconds), ``variable``.
    """
    # A file that cannot be drawn must not cost the reader the rest of the page.
    try:
        # No pickles: a run directory may come from somebody else, and loading one would execute its code.
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        return _draw_maps(arrays)
    except FileNotFoundError:
        return ForecastMaps(missing="No forecast has been drawn yet: the run writes one when it ends.")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        return ForecastMaps(missing=f"The forecast in {path.name} cannot be drawn: {error}")


def _draw_maps(arrays: Mapping[str, np.ndarray]) -> ForecastMaps:
    variable, date = str(arrays["variable"]), float(arrays["date"])
    unit = unit_of(variable)
    truth, forecast, persistence = (
        np.asarray(arrays[key], dtype=float) * unit.factor for key in ("truth", "forecast", "persistence")
    )
    latitudes, longitudes = _axes(arrays["latitudes"], arrays["longitudes"], shape=truth.shape)
    error = forecast - truth
    # One colour scale for all lead times; percentiles, because one extreme cell would leave the rest in one colour.
    low, high = np.nanpercentile(truth, (0.5, 99.5))
    largest = float(np.nanpercentile(np.abs(error), 99.5)) or 1.0
    leads = []
    for i, lead_s in enumerate(np.asarray(arrays["lead_s"], dtype=float)[:MAX_CHARTED_LEADS]):
        when = f"{lead_label(lead_s)}, valid {date_label(date + lead_s)}"
        panels = []
        for title, values, limits, diverging in (
            ("Forecast", forecast[i], (low, high), False),
            ("Truth", truth[i], (low, high), False),
            ("Error", error[i], (-largest, largest), True),
        ):
            field = Field(
                name=f"map-{title.lower()}-{i}",
                alt=f"Map of the {title.lower()} of {variable} at {when}, from {np.nanmin(values):.4g} to "
                f"{np.nanmax(values):.4g} {unit.symbol}",
                title=f"{title} {when}",
                values=values,
                latitudes=latitudes,
                longitudes=longitudes,
                limits=limits,
                unit=f"{variable}, {unit.symbol}" + (": forecast minus truth" if diverging else ""),
                diverging=diverging,
            )
            panels.append(draw_map(field))
        rmse, reference = (_rmse(values - truth[i], latitudes) for values in (forecast[i], persistence[i]))
        decimals = _decimals(max(rmse, reference) or 1.0)
        texts = (f"{value:.{decimals}f} {unit.symbol}" for value in (rmse, reference))
        leads.append(LeadMaps(lead_label(lead_s), panels, *texts))
    return ForecastMaps(variable, date_label(date), leads)


def _axes(latitudes: np.ndarray, longitudes: np.ndarray, *, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the axes of a regular grid, also if each cell comes with its own coordinates.

    Raises
    ------
    ValueError
        The fields are not on a regular grid, or the coordinates do not fit them.
    """
    if len(shape) != 3 or min(shape[1:]) < 2:
        raise ValueError(f"fields of shape {shape} are not (lead, latitude, longitude) on a regular grid")
    if latitudes.size == longitudes.size == shape[1] * shape[2]:
        latitudes, longitudes = latitudes.reshape(shape[1:])[:, 0], longitudes.reshape(shape[1:])[0]
    if (latitudes.size, longitudes.size) != shape[1:]:
        raise ValueError(f"{latitudes.size} latitudes and {longitudes.size} longitudes do not fit fields of {shape}")
    return np.asarray(latitudes, dtype=float), np.asarray(longitudes, dtype=float)


def _rmse(error: np.ndarray, latitudes: np.ndarray) -> float:
    # Cells shrink towards the poles: without weights they would count far too much.
    weights = np.broadcast_to(np.cos(np.radians(latitudes))[:, None], error.shape)
    return math.sqrt(np.average(error**2, weights=weights))
