"""The sections of a report that hold figures: from events and arrays to what the template shows. No torch."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anemoi_dist.report.figures import Chart, Curve, Field, draw_chart, draw_map
from anemoi_dist.run.events import Event, latest_by_step

FORECASTS = {
    "model": "Model",
    "persistence": "Persistence",
    "climatology": "Climatology",
    "tide_tendency": "Tide + damped tendency",
}
# Charts beyond these would hide the page; the table has every variable.
MAX_CHARTED_VARIABLES = 4
MAX_CHARTED_LEADS = 4


class Unit(NamedTuple):
    """How values of a variable are shown: times ``factor``, followed by ``symbol``."""

    symbol: str
    factor: float = 1.0


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
    """Return the steps from which attempts after the first one went on."""
    starts = [event for event in events if event["event"] == "start"]
    return [event.get("resumed_from_step") or 0 for event in starts[1:]]


def curves(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the training curves: ``title``, ``note``, ``svg``; one for each value that was recorded."""
    steps = latest_by_step(events, "step")
    resumed, skipped = sorted(set(restarts(events))), list(latest_by_step(events, "skipped_update"))
    wanted = (
        ("loss", "Loss", "cos-latitude-weighted, of the normalised tendency", "log", True),
        ("grad_norm", "Gradient norm", "global L2 norm, before clipping", "log", True),
        ("lr", "Learning rate", "of the first parameter group", "linear", False),
        ("alpha", "alpha", "weight of AdEMAMix's slow average", "linear", False),
        ("beta3", "beta3", "decay of AdEMAMix's slow average", "decay", False),
        ("samples_per_s", "Speed", "samples per second, over all ranks, moving window", "linear", False),
    )
    figures = []
    for key, title, note, scale, smooth in wanted:
        x, y = _series(steps, key)
        if not any(math.isfinite(value) for value in y):
            continue
        chart = Chart(
            name=f"curve-{key}",
            alt=f"{title} against optimizer step, from {_first(y):.4g} to {_first(y[::-1]):.4g}",
            curves=[Curve(title, x, y)],
            scale=_fitting_scale(scale, y),
            smooth=smooth and len(y) >= 25,
            restarts=resumed,
            skipped=skipped,
        )
        if chart.scale == "log":
            note += ", log scale"
        figures.append({"title": title, "note": note, "svg": draw_chart(chart)})
    return figures


def _series(steps: Mapping[int, Event], key: str) -> tuple[list[int], list[float]]:
    points = [(step, event[key]) for step, event in steps.items() if key in event]
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def _first(values: Sequence[float]) -> float:
    return next(value for value in values if math.isfinite(value))


def _fitting_scale(scale: str, values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if scale == "log" and (min(known) <= 0 or max(known) / min(known) < 5):
        return "linear"
    if scale == "decay" and not 0 <= min(known) <= max(known) < 1:
        return "linear"
    return scale


def skill(events: Sequence[Event]) -> dict[str, Any] | None:
    """Return the tables and charts of forecast skill, or None where nothing has been scored.

    The table shows the last scores on the test block, before there are any those on the validation block.
    """
    validations = latest_by_step(events, "validation", split="validation")
    tests = latest_by_step(events, "validation", split="test")
    scored = list((tests or validations).values())
    if not scored:
        return None
    event = scored[-1]
    names = list(dict.fromkeys(score["variable"] for score in event["scores"]))
    variables = [_skill_table(name, event["scores"]) for name in names]
    comparisons = [gain for table in variables for gain in table["gains"] if gain is not None]
    charts = []
    for name in names[:MAX_CHARTED_VARIABLES]:
        charts += _skill_charts(name, event, list(validations.values()))
    return {
        "split": event["split"],
        "step": event["step"],
        "variables": variables,
        "num_compared": len(comparisons),
        "num_won": sum(gain < 0 for gain in comparisons),
        "charts": charts,
        "num_uncharted": max(len(names) - MAX_CHARTED_VARIABLES, 0),
    }


def _skill_table(variable: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_key = {(s["forecast"], s["lead_s"]): s for s in scores if s["variable"] == variable}
    leads = sorted({lead for _, lead in by_key})
    forecasts = forecast_order({forecast for forecast, _ in by_key})
    unit = unit_of(variable)
    rmse = {key: s["rmse"] * unit.factor for key, s in by_key.items() if s.get("rmse") is not None}
    acc = {key: s["acc"] for key, s in by_key.items() if s.get("acc") is not None}
    lowest = {lead: min((v for (_, at), v in rmse.items() if at == lead), default=None) for lead in leads}
    highest = {lead: max((v for (_, at), v in acc.items() if at == lead), default=None) for lead in leads}
    decimals = _decimals(min((value for value in rmse.values() if value > 0), default=1.0))
    rows = []
    for forecast in forecasts:
        cells = []
        for lead in leads:
            key = (forecast, lead)
            cells.append(
                {
                    "rmse": f"{rmse[key]:.{decimals}f}" if key in rmse else "–",
                    "acc": f"{acc[key]:.3f}" if key in acc else "–",
                    "best_rmse": key in rmse and rmse[key] == lowest[lead],
                    "best_acc": key in acc and acc[key] == highest[lead],
                }
            )
        rows.append({"name": forecast_name(forecast), "style": forecast_style(forecast), "cells": cells})
    gains = [_gain(lead, rmse) for lead in leads]
    return {
        "variable": variable,
        "unit": unit.symbol,
        "leads": [lead_label(lead) for lead in leads],
        "rows": rows,
        "gains": gains,
        "first_rmse": f"{rmse['model', leads[0]]:.{decimals}f}" if ("model", leads[0]) in rmse else None,
    }


def _gain(lead: float, rmse: Mapping[tuple[str, float], float]) -> float | None:
    """Return the model's RMSE relative to the best baseline's, less 1; None where one of them is missing."""
    baselines = [value for (forecast, at), value in rmse.items() if at == lead and forecast != "model"]
    if ("model", lead) not in rmse or not baselines or min(baselines) <= 0:
        return None
    return rmse["model", lead] / min(baselines) - 1


def forecast_order(forecasts: set[str]) -> list[str]:
    """Return the names in the order of every table and legend: the model, its baselines, others."""
    return [name for name in FORECASTS if name in forecasts] + sorted(forecasts - set(FORECASTS))


def forecast_name(forecast: str) -> str:
    """Return the name that a reader sees."""
    return FORECASTS.get(forecast, forecast.replace("_", " "))


def forecast_style(forecast: str) -> int:
    """Return the number of the colour and marker that a forecast has everywhere on the page."""
    return list(FORECASTS).index(forecast) if forecast in FORECASTS else len(FORECASTS)


def _decimals(smallest: float) -> int:
    return max(2 - math.floor(math.log10(smallest)), 0)


def _skill_charts(variable: str, event: Event, validations: Sequence[Event]) -> list[dict[str, str]]:
    unit = unit_of(variable)
    scores = [s for s in event["scores"] if s["variable"] == variable and s.get("rmse") is not None]
    leads = sorted({s["lead_s"] for s in scores})
    charts = []
    if len(leads) > 1:
        lines = []
        for forecast in forecast_order({s["forecast"] for s in scores}):
            points = sorted((s["lead_s"] / 3600, s["rmse"] * unit.factor) for s in scores if s["forecast"] == forecast)
            x, y = zip(*points, strict=True)
            lines.append(Curve(forecast_name(forecast), x, y, forecast_style(forecast), markers=True))
        chart = Chart(
            name=f"lead-{variable}",
            alt=f"RMSE of {variable} against lead time for the model and its baselines, as in the table above",
            curves=lines,
            x_label="lead time, h",
            scale="log",
            x_ticks=[lead / 3600 for lead in leads],
        )
        title = f"{variable}: RMSE by lead time"
        charts.append({"title": title, "note": f"{unit.symbol}, {event['split']} block", "svg": draw_chart(chart)})
    for lead in leads[:MAX_CHARTED_LEADS]:
        if svg := _training_chart(variable, lead, validations, unit):
            title = f"{variable}: RMSE at {lead_label(lead)} during training"
            charts.append({"title": title, "note": f"{unit.symbol}, validation block", "svg": svg})
    return charts


def _training_chart(variable: str, lead: float, validations: Sequence[Event], unit: Unit) -> str | None:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in validations:
        for s in event["scores"]:
            if s["variable"] == variable and s["lead_s"] == lead and s.get("rmse") is not None:
                found.setdefault(s["forecast"], []).append((event["step"], s["rmse"] * unit.factor))
    if not found:
        return None
    lines = []
    for forecast in forecast_order(set(found)):
        x, y = zip(*found[forecast], strict=True)
        lines.append(Curve(forecast_name(forecast), x, y, forecast_style(forecast), markers=forecast == "model"))
    return draw_chart(
        Chart(
            name=f"training-{variable}-{lead:g}",
            alt=f"RMSE of {variable} at {lead_label(lead)} on the validation block against optimizer step",
            curves=lines,
            scale="log",
        )
    )


def maps(path: Path) -> dict[str, Any]:
    """Return the maps of one forecast.

    Parameters
    ----------
    path : Path
        ``forecast.npz``: ``truth``, ``forecast``, ``persistence`` of shape (lead, latitude, longitude), ``lead_s``,
        ``latitudes``, ``longitudes``, ``date`` (Unix seconds), ``variable``.

    Returns
    -------
    dict[str, Any]
        ``missing``, a sentence, where there is nothing to draw; else ``variable``, ``date`` and ``leads``.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        return _draw_maps(arrays)
    except FileNotFoundError:
        return {"missing": "No forecast has been drawn yet: the run writes one when it ends."}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        return {"missing": f"The forecast in {path.name} cannot be drawn: {error}"}


def _draw_maps(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    variable, date = str(arrays["variable"]), float(arrays["date"])
    unit = unit_of(variable)
    truth, forecast, persistence = (
        np.asarray(arrays[key], dtype=float) * unit.factor for key in ("truth", "forecast", "persistence")
    )
    latitudes, longitudes = _axes(arrays["latitudes"], arrays["longitudes"], shape=truth.shape)
    error = forecast - truth
    low, high = np.nanpercentile(truth, (0.5, 99.5))
    largest = float(np.nanpercentile(np.abs(error), 99.5)) or 1.0
    leads = []
    for i, lead in enumerate(np.asarray(arrays["lead_s"], dtype=float)[:MAX_CHARTED_LEADS]):
        when = f"{lead_label(lead)}, valid {date_label(date + lead)}"
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
        rmse, reference = (_rmse(field - truth[i], latitudes) for field in (forecast[i], persistence[i]))
        decimals = _decimals(max(rmse, reference) or 1.0)
        leads.append(
            {
                "label": lead_label(lead),
                "panels": panels,
                "rmse": f"{rmse:.{decimals}f} {unit.symbol}",
                "persistence": f"{reference:.{decimals}f} {unit.symbol}",
            }
        )
    return {"variable": variable, "date": date_label(date), "leads": leads}


def _axes(latitudes: np.ndarray, longitudes: np.ndarray, *, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the axes of a regular grid, also where each cell comes with its own coordinates."""
    if len(shape) != 3 or min(shape[1:]) < 2:
        raise ValueError(f"fields of shape {shape} are not (lead, latitude, longitude) on a regular grid")
    if latitudes.size == longitudes.size == shape[1] * shape[2]:
        latitudes, longitudes = latitudes.reshape(shape[1:])[:, 0], longitudes.reshape(shape[1:])[0]
    if (latitudes.size, longitudes.size) != shape[1:]:
        raise ValueError(f"{latitudes.size} latitudes and {longitudes.size} longitudes do not fit fields of {shape}")
    return np.asarray(latitudes, dtype=float), np.asarray(longitudes, dtype=float)


def _rmse(error: np.ndarray, latitudes: np.ndarray) -> float:
    weights = np.broadcast_to(np.cos(np.radians(latitudes))[:, None], error.shape)
    return math.sqrt(np.average(error**2, weights=weights))
