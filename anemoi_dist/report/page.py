"""The report of a run: one HTML page that stands alone, made from what lies in the run directory. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import anemoi_dist
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.events import Event, latest_by_step, read_events
from anemoi_dist.telemetry.progress import format_bytes, format_duration, format_number

# What a reader sees of each phase, and its colour: training has that of the model.
PHASES = {
    "startup": ("Start-up", 2),
    "data": ("Waiting for data", 1),
    "step": ("Training steps", 0),
    "validation": ("Validation", 3),
    "checkpoint": ("Saving checkpoints", 4),
}
# Beyond so many ranks the table shows the smallest and the largest.
MAX_LISTED_RANKS = 4


def write_report(run: RunDirectory) -> Path:
    """Write ``report/index.html`` of a run, finished or not, and return its path.

    The page needs no other file and no network. What the run has not produced yet is left out with a sentence.

    Raises
    ------
    ConfigError
        There is no such run, or nothing has been recorded of it; the message names the runs that exist.
    PreflightError
        Matplotlib or Jinja is not installed.
    """
    events = read_events(run.events_file)
    if not events:
        raise _no_events(run)
    try:
        import jinja2

        from anemoi_dist.report import sections
    except ImportError as error:
        raise PreflightError(
            f"a report needs matplotlib and jinja2, and one cannot be imported here ({error})\n"
            "  fix: pip install 'anemoi-dist[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config_text = run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else ""
    skill = sections.skill(events)
    page = environment.get_template("template.html.j2").render(
        run_id=run.run_id,
        state=run.read_state().state,
        version=anemoi_dist.__version__,
        tiles=tiles(events, skill, config_text),
        facts=facts(events, config_text),
        versions=_mapping(_latest_start(events).get("versions")),
        memory=memory(events),
        curves=sections.curves(events),
        skill=skill,
        maps=sections.maps(run.report_dir / "forecast.npz"),
        time=time_spent(events),
        config_text=config_text,
    )
    run.report_dir.mkdir(mode=0o700, exist_ok=True)
    path = run.report_dir / "index.html"
    write_atomically(path, page)
    return path


def _no_events(run: RunDirectory) -> ConfigError:
    root = run.path.parent
    existing = sorted(path.parent.name for path in root.glob("*/events.jsonl"))
    rule = "has no events yet; it has not started" if run.path.is_dir() else f"is no run below {root}"
    fix = "name one of the runs that exist" if existing else "train first, or set run.root to where the runs are"
    return ConfigError("run.id", run.run_id, rule, fix=fix, valid=existing)


def tiles(events: Sequence[Event], skill: Mapping[str, Any] | None, config_text: str) -> list[dict[str, str]]:
    """Return the few numbers that stand first: ``label``, ``value``, ``note``."""
    steps = list(latest_by_step(events, "step").values())
    found = []
    if skill and (table := skill["variables"][0])["first_rmse"]:
        gain = table["gains"][0]
        note = "" if gain is None else f"{abs(100 * gain):.0f} % {'below' if gain < 0 else 'above'} the best baseline"
        label = f"RMSE of {table['variable']} at {table['leads'][0]}, {skill['split']} block"
        found.append({"label": label, "value": f"{table['first_rmse']} {table['unit']}", "note": note})
    losses = [event["loss"] for event in steps if event.get("loss") is not None]
    if losses:
        recent = statistics.fmean(losses[-max(len(losses) // 25, 1) :])
        first = f"from {format_number(losses[0], digits=3)} at step {steps[0]['step']}"
        found.append({"label": "Training loss, recent mean", "value": format_number(recent, digits=3), "note": first})
    if steps:
        total = OmegaConf.select(OmegaConf.create(config_text), "training.max_steps")
        skipped = len(latest_by_step(events, "skipped_update"))
        note = f"of {total}" if total else ""
        note += f"{', ' if note else ''}{skipped} skipped" if skipped else ""
        found.append({"label": "Optimizer steps", "value": f"{_last_step(events)}", "note": note})
    speeds = [event["samples_per_s"] for event in steps if event.get("samples_per_s")]
    if speeds:
        speed = format_number(statistics.median(speeds), digits=3)
        found.append({"label": "Speed, median", "value": f"{speed} /s", "note": "samples, over all ranks"})
    durations = _attempt_durations_s(events)
    note = "one attempt" if len(durations) == 1 else f"{len(durations)} attempts"
    found.append({"label": "Time", "value": format_duration(sum(durations)), "note": note})
    return found


def facts(events: Sequence[Event], config_text: str) -> list[tuple[str, str]]:
    """Return what the run is made of, as pairs of a name and a value."""
    from anemoi_dist.report.sections import date_label, restarts

    start, config = _latest_start(events), OmegaConf.create(config_text)
    steps = list(latest_by_step(events, "step").values())
    parameters = start.get("num_parameters")
    held = steps[-1].get("memory_bytes") if steps else None
    resumed = ", ".join(f"step {step}" for step in restarts(events))
    known = {
        "Engine": _text(start.get("engine")),
        "Ranks": _text(start.get("world_size")),
        "Parameters": f"{parameters:,}".replace(",", "\u202f") if parameters else "",
        "Model": _text(OmegaConf.select(config, "model._target_")),
        "Optimizer": _text(OmegaConf.select(config, "training.optimizer._target_")),
        "Precision": _text(OmegaConf.select(config, "training.precision")),
        "Global batch": _text(OmegaConf.select(config, "training.global_batch_size")),
        "Seed": _text(OmegaConf.select(config, "run.seed")),
        "Process memory": format_bytes(held) if held else "",
        "First event": date_label(events[0]["time"]),
        "Last event": date_label(events[-1]["time"]),
        "Resumed from": resumed,
    }
    return [(name, value) for name, value in known.items() if value]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item not in (None, {}, ""))
    return "" if value is None else str(value)


def _mapping(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, Mapping) else {}


def _latest_start(events: Sequence[Event]) -> Event:
    starts = [event for event in events if event["event"] == "start"]
    return starts[-1] if starts else {}


def _last_step(events: Sequence[Event]) -> int:
    """Return the last step that counts: not what an attempt did after the checkpoint the next one went on from."""
    reached = 0
    for event in events:
        reached = event["step"] if event["event"] == "start" else max(reached, event["step"])
    return reached


def _attempt_durations_s(events: Sequence[Event]) -> list[float]:
    spans: list[list[float]] = []
    for event in events:
        if event["event"] == "start" or not spans:
            spans.append([event["time"], event["time"]])
        spans[-1][1] = event["time"]
    return [end - start for start, end in spans]


def memory(events: Sequence[Event]) -> dict[str, Any] | None:
    """Return what each rank holds, by part, or None where the run did not say.

    Returns
    -------
    dict[str, Any] or None
        ``columns`` (names of ranks), ``rows`` (``name``, ``style``, ``cells``, ``total`` of each part) and ``bars``
        (for each column: the part's share of the largest column, in percent).
    """
    ranks = _memory_of_ranks(_latest_start(events).get("memory"))
    if not ranks:
        return None
    if len(ranks) > MAX_LISTED_RANKS:
        ordered = sorted(ranks.values(), key=lambda parts: sum(parts.values()))
        ranks = {"smallest": ordered[0], "largest": ordered[-1]}
    names = list(dict.fromkeys(name for parts in ranks.values() for name in parts))
    names = [name for name in names if any(parts.get(name) for parts in ranks.values())]
    largest = max(sum(parts.values()) for parts in ranks.values()) or 1
    rows = [
        {"name": name, "style": i % 5, "cells": [format_bytes(parts.get(name, 0)) for parts in ranks.values()]}
        for i, name in enumerate(names)
    ]
    bars = [
        {
            "name": rank,
            "parts": [
                {"name": name, "style": i % 5, "percent": 100 * parts.get(name, 0) / largest}
                for i, name in enumerate(names)
            ],
        }
        for rank, parts in ranks.items()
    ]
    totals = [format_bytes(sum(parts.values())) for parts in ranks.values()]
    return {"columns": list(ranks), "rows": rows, "totals": totals, "bars": bars}


def _memory_of_ranks(recorded: Any) -> dict[str, dict[str, int]]:
    """Return bytes by rank and part; the event holds one rank's report, a list of them, or a mapping by rank."""
    if not recorded:
        return {}
    if isinstance(recorded, Mapping) and "parameters" in recorded:
        reports = {"each rank": recorded}
    elif isinstance(recorded, Mapping):
        reports = {f"rank {rank}" if str(rank).isdigit() else str(rank): item for rank, item in recorded.items()}
    else:
        reports = {f"rank {rank}": item for rank, item in enumerate(recorded)}
    return {
        rank: {
            "parameters": int(report.get("parameters", 0)),
            "fp32 masters": int(report.get("master", 0)),
            **{str(name): int(size) for name, size in report.get("states", {}).items()},
        }
        for rank, report in reports.items()
    }


def time_spent(events: Sequence[Event]) -> dict[str, Any] | None:
    """Return where the time went, summed over the attempts that came to an end, or None where none did."""
    ends = [event["seconds"] for event in events if event["event"] == "end" and event.get("seconds")]
    if not ends:
        return None
    names = list(dict.fromkeys(name for seconds in ends for name in seconds))
    seconds = {name: sum(end.get(name) or 0.0 for end in ends) for name in names}
    total = sum(seconds.values()) or 1.0
    phases = [
        {
            "name": PHASES.get(name, (name, 2))[0],
            "style": PHASES.get(name, (name, 2))[1],
            "seconds": f"{value:.1f}" if value < 100 else f"{value:.0f}",
            "percent": 100 * value / total,
        }
        for name, value in seconds.items()
    ]
    num_starts = sum(event["event"] == "start" for event in events)
    return {
        "phases": phases,
        "total": format_duration(total),
        "useful": f"{100 * seconds.get('step', 0.0) / total:.0f} %",
        "num_unfinished": max(num_starts - len(ends), 0),
    }
