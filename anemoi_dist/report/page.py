"""Report of a run: one self-contained HTML page, made from the files of the run directory. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

import anemoi_dist
from anemoi_dist.config.secrets import redact
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.events import Event, latest_by_step, read_events
from anemoi_dist.telemetry.progress import format_bytes, format_duration, format_number

if TYPE_CHECKING:
    from anemoi_dist.report.sections import Skill

# Name and colour of each phase as shown to the reader; training steps have the colour of the model.
PHASES = {
    "startup": ("Start-up", 2),
    "data": ("Waiting for data", 1),
    "step": ("Training steps", 0),
    "validation": ("Validation", 3),
    "checkpoint": ("Saving checkpoints", 4),
}
# With more ranks than this the table shows the smallest and the largest: their difference is what matters.
MAX_LISTED_RANKS = 4
NUM_STYLES = 5


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class MemoryRow:
    """One part of the memory, such as ``exp_avg_slow``.

    Attributes
    ----------
    name, style : str, int
        Name of the part, number of its colour.
    cells : list[str]
        Its size in each column.
    percents : list[float]
        Its share of the largest column's total, in percent.
    """

    name: str
    style: int
    cells: list[str]
    percents: list[float]


@dataclass(frozen=True)
class MemoryTable:
    """Memory of the ranks named by ``columns``, by part, with the total of each."""

    columns: list[str]
    rows: list[MemoryRow]
    totals: list[str]


@dataclass(frozen=True)
class PhaseShare:
    """Time spent in one phase, in seconds (as text) and in percent of all phases."""

    name: str
    style: int
    seconds: str
    percent: float


@dataclass(frozen=True)
class TimeSpent:
    """Time of the attempts that ended, by phase; ``useful`` is the share of training steps."""

    phases: list[PhaseShare]
    total: str
    useful: str
    num_unfinished: int


def write_report(run: RunDirectory) -> Path:
    """Write ``report/index.html`` of a run, finished or not, and return its path.

    The page needs no other file and no network. A sentence replaces anything that the run has not produced yet.

    Raises
    ------
    ConfigError
        There is no such run, or it has no events yet; the message names the runs that exist.
    PreflightError
        Matplotlib or Jinja is not installed.
    """
    events = read_events(run.events_file)
    if not events:
        raise _no_events(run)
    # Imported here: both come with an extra that a training node may lack, and matplotlib takes a second.
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
        autoescape=True,  # names of variables, models and runs are text, whatever characters they hold
        undefined=jinja2.StrictUndefined,  # a misspelt attribute fails instead of leaving a gap on the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config_text = run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else ""
    config = OmegaConf.create(config_text)
    skill = sections.skill(events)
    page = environment.get_template("template.html.j2").render(
        run_id=run.run_id,
        state=run.read_state().state,
        version=anemoi_dist.__version__,
        tiles=tiles(events, skill, config),
        facts=facts(events, config),
        versions=_latest_start(events).get("versions") or {},
        memory=memory(events),
        curves=sections.curves(events),
        skill=skill,
        named=sections.named_scores(events),
        maps=sections.maps(run.report_dir / "forecast.npz"),
        time=time_spent(events),
        config_text=redact(config_text),
    )
    # As private as the rest of the run: the page shows the whole configuration.
    run.report_dir.mkdir(mode=0o700, exist_ok=True)
    path = run.report_dir / "index.html"
    write_atomically(path, page)
    return path


def _no_events(run: RunDirectory) -> ConfigError:
    # Runs that have events, because the others have no report either.
    root = run.path.parent
    existing = sorted(path.parent.name for path in root.glob("*/events.jsonl"))
    rule = "has no events yet; it has not started" if run.path.is_dir() else f"is no run below {root}"
    fix = "name one of the runs that exist" if existing else "train first, or set run.root to where the runs are"
    return ConfigError("run.id", run.run_id, rule, fix=fix, valid=existing)


def tiles(events: Sequence[Event], skill: Skill | None, config: Any) -> list[Tile]:
    """Return the numbers at the top of the page, those that are known."""
    steps = list(latest_by_step(events, "step").values())
    found = []
    if skill is not None and (table := skill.tables[0]).first_rmse:
        gain = table.gains[0]
        note = "" if gain is None else f"{abs(100 * gain):.0f} % {'below' if gain < 0 else 'above'} the best baseline"
        label = f"RMSE of {table.variable} at {table.leads[0]}, {skill.split} split"
        found.append(Tile(label, f"{table.first_rmse} {table.unit}", note))
    losses = [event["loss"] for event in steps if event.get("loss") is not None]
    if losses:
        # The loss of one batch is noisy: the mean of the last 4 % says more than the last value.
        recent = statistics.fmean(losses[-max(len(losses) // 25, 1) :])
        first = f"from {format_number(losses[0], digits=3)} at step {steps[0]['step']}"
        found.append(Tile("Training loss, recent mean", format_number(recent, digits=3), first))
    if steps:
        total = OmegaConf.select(config, "training.max_steps")
        num_skipped = len(latest_by_step(events, "skipped_update"))
        notes = [f"of {total}"] * bool(total) + [f"{num_skipped} skipped"] * bool(num_skipped)
        found.append(Tile("Optimizer steps", f"{_last_step(events)}", ", ".join(notes)))
    speeds = [event["samples_per_s"] for event in steps if event.get("samples_per_s")]
    if speeds:
        # The median: a few steps behind a busy file system must not change the speed of the run.
        speed = format_number(statistics.median(speeds), digits=3)
        found.append(Tile("Speed, median", f"{speed} /s", "samples, over all ranks"))
    durations = _attempt_durations_s(events)
    note = "one attempt" if len(durations) == 1 else f"{len(durations)} attempts"
    found.append(Tile("Time", format_duration(sum(durations)), note))
    return found


def facts(events: Sequence[Event], config: Any) -> list[tuple[str, str]]:
    """Return model, engine, optimizer, ..., those that are known, as pairs of a name and a value."""
    # Like above: the module needs matplotlib.
    from anemoi_dist.report.sections import date_label, restarts

    start = _latest_start(events)
    steps = list(latest_by_step(events, "step").values())
    num_parameters = start.get("num_parameters")
    num_bytes = steps[-1].get("memory_bytes") if steps else None
    known = {
        "Engine": start.get("engine"),
        "Ranks": start.get("world_size"),
        # Narrow no-break spaces, which mean the same in every country.
        "Parameters": f"{num_parameters:,}".replace(",", "\u202f") if num_parameters else "",
        "Model": OmegaConf.select(config, "model._target_"),
        "Optimizer": OmegaConf.select(config, "training.optimizer._target_"),
        "Precision": OmegaConf.select(config, "training.precision"),
        "Global batch": OmegaConf.select(config, "training.global_batch_size"),
        "Seed": OmegaConf.select(config, "run.seed"),
        "Process memory": format_bytes(num_bytes) if num_bytes else "",
        "First event": date_label(events[0]["time"]),
        "Last event": date_label(events[-1]["time"]),
        "Resumed from": ", ".join(f"step {step}" for step in restarts(events)),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _latest_start(events: Sequence[Event]) -> Event:
    # The latest: a resumed run may have another engine or number of ranks.
    starts = [event for event in events if event["event"] == "start"]
    return starts[-1] if starts else {}


def _last_step(events: Sequence[Event]) -> int:
    """Return the last step that counts: without the steps that a later attempt repeats from its checkpoint."""
    reached = 0
    for event in events:
        reached = event["step"] if event["event"] == "start" else max(reached, event["step"])
    return reached


def _attempt_durations_s(events: Sequence[Event]) -> list[float]:
    # From the first to the last event of each attempt: a killed one has no end event.
    spans: list[list[float]] = []
    for event in events:
        if event["event"] == "start" or not spans:
            spans.append([event["time"], event["time"]])
        spans[-1][1] = event["time"]
    return [end - start for start, end in spans]


def memory(events: Sequence[Event]) -> MemoryTable | None:
    """Return the memory that each rank held at the last start, or None if it was not recorded."""
    reports = _latest_start(events).get("memory")
    if not reports:
        return None
    ranks = {f"rank {rank}": _memory_parts(report) for rank, report in enumerate(reports)}
    if len(ranks) > MAX_LISTED_RANKS:
        smallest, *_, largest = sorted(ranks.values(), key=lambda parts: sum(parts.values()))
        ranks = {"smallest": smallest, "largest": largest}
    columns = list(ranks.values())
    reported = dict.fromkeys(name for parts in columns for name in parts)
    # An engine without separate masters reports 0 bytes of them: no row, no colour.
    names = [name for name in reported if any(parts.get(name) for parts in columns)]
    totals = [sum(parts.values()) for parts in columns]
    rows = []
    for i, name in enumerate(names):
        sizes = [parts.get(name, 0) for parts in columns]
        percents = [100 * size / (max(totals) or 1) for size in sizes]
        rows.append(MemoryRow(name, i % NUM_STYLES, [format_bytes(size) for size in sizes], percents))
    return MemoryTable(list(ranks), rows, [format_bytes(total) for total in totals])


def _memory_parts(report: Mapping[str, Any]) -> dict[str, int]:
    """Return bytes by part, of one rank's :class:`~anemoi_dist.engines.base.MemoryReport` in an event."""
    return {"parameters": report["parameters"], "fp32 masters": report["master"], **report["states"]}


def time_spent(events: Sequence[Event]) -> TimeSpent | None:
    """Return the time by phase, summed over the attempts that ended, or None if none did."""
    ends = [event["seconds"] for event in events if event["event"] == "end" and event.get("seconds")]
    if not ends:
        return None
    names = list(dict.fromkeys(name for seconds in ends for name in seconds))
    seconds = {name: sum(end.get(name) or 0.0 for end in ends) for name in names}
    total = sum(seconds.values()) or 1.0
    phases = []
    for name, value in seconds.items():
        label, style = PHASES.get(name, (name, 2))  # a phase of another version keeps its own name
        phases.append(PhaseShare(label, style, f"{value:.1f}" if value < 100 else f"{value:.0f}", 100 * value / total))
    num_starts = sum(event["event"] == "start" for event in events)
    return TimeSpent(
        phases,
        total=format_duration(total),
        useful=f"{100 * seconds.get('step', 0.0) / total:.0f} %",
        num_unfinished=max(num_starts - len(ends), 0),
    )
