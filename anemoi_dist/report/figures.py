"""Figures of a report as SVG, coloured by the style of the surrounding HTML page. No torch.

Matplotlib draws them through its Figure interface: no display, no global state of ``pyplot``.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# Placeholder colours, replaced by CSS variables of the page, so that dark mode works. Matplotlib takes no variables.
INK, MUTED, GRID, BAD = "#101114", "#101115", "#101116", "#101117"
SERIES = ("#101120", "#101121", "#101122", "#101123", "#101124")
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    BAD: "var(--bad)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}
# Colour alone would not tell the curves apart in print, or for a colour-blind reader.
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (2, 1)))

RC: dict[Any, Any] = {
    # Text stays text: it can be searched, and takes the font of the page.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": INK,
    # The name of a variable may hold a dollar sign, which would start a formula.
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: ``y`` against ``x``, with gaps at NaN; ``style`` picks colour and marker."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of curves.

    Attributes
    ----------
    name : str
        Unique on its page.
    alt : str
        Description for screen readers.
    curves : Sequence[Curve]
        A single one gets no legend.
    x_label : str
        Label of the horizontal axis.
    scale : str
        ``linear``, ``log``, or ``decay`` for a decay rate such as 0.9999, drawn by its distance from 1.
    smooth : bool
        Draw the single curve faintly, and a running mean over it.
    restarts, skipped : Sequence[int]
        Steps to mark.
    x_ticks : Sequence[float]
        Positions of the ticks; if empty, they are chosen.
    """

    name: str
    alt: str
    curves: Sequence[Curve]
    x_label: str = "optimizer step"
    scale: str = "linear"
    smooth: bool = False
    restarts: Sequence[int] = field(default=())
    skipped: Sequence[int] = field(default=())
    x_ticks: Sequence[float] = field(default=())


def draw_chart(chart: Chart) -> str:
    """Return a chart as SVG."""
    # The salt makes ids of clip paths reproducible, and different from those of other figures on the page.
    with matplotlib.rc_context({**RC, "svg.hashsalt": chart.name}):
        figure = Figure(figsize=(5.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for curve in chart.curves:
            if chart.scale == "decay":
                curve = replace(curve, y=[1 - value for value in curve.y])
            _draw_curve(axes, curve, faint=chart.smooth, alone=len(chart.curves) == 1)
        if chart.smooth:
            _draw_running_mean(axes, chart.curves[0])
        _scale_y(axes, chart)
        _mark_steps(axes, chart)
        axes.set_xlabel(chart.x_label, loc="right")
        axes.grid(visible=False, axis="x")
        if not len(chart.x_ticks):
            # A run with a single step would otherwise get an axis of fractions of a step.
            last = max(5.0, *(curve.x[-1] for curve in chart.curves))
            axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.xaxis.set_major_locator(
            FixedLocator(list(chart.x_ticks))
            if len(chart.x_ticks)
            else MaxNLocator(7, integer=True, steps=[1, 2, 5, 10])
        )
        axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
        if axes.get_legend_handles_labels()[1]:
            columns = min(len(axes.get_legend_handles_labels()[1]), 4)
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=1.8, columnspacing=1.4
            )
        return _to_svg(figure, alt=chart.alt)


def _draw_curve(axes: Axes, curve: Curve, *, faint: bool, alone: bool) -> None:
    colour = SERIES[curve.style % len(SERIES)]
    axes.plot(
        curve.x,
        curve.y,
        color=colour,
        alpha=0.35 if faint else 1,
        linewidth=0.9 if faint else 1.6 if curve.style == 0 else 1.2,
        linestyle=DASHES[curve.style % len(DASHES)],
        # A line through a single point is invisible.
        marker=MARKERS[curve.style % len(MARKERS)] if curve.markers or len(curve.x) == 1 else None,
        markersize=3.5,
        label=curve.label if not alone else "recorded" if faint else None,
    )


def _draw_running_mean(axes: Axes, curve: Curve) -> None:
    values = np.asarray(curve.y, dtype=float)
    width = max(len(values) // 25, 1)
    # Skipped updates have no gradient norm: they are left out of the mean instead of making it NaN.
    known = np.isfinite(values)
    kernel = np.ones(2 * width + 1)
    total = np.convolve(np.where(known, values, 0.0), kernel)[width:-width]
    count = np.convolve(known.astype(float), kernel)[width:-width]
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    axes.plot(curve.x, mean, color=SERIES[curve.style], linewidth=1.6, label="running mean")


def _scale_y(axes: Axes, chart: Chart) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if chart.scale == "linear" or not values.size or values.min() <= 0:
        return
    low, high = values.min(), values.max()
    margin = max((high / low) ** 0.06, 1.05)
    # Before the locators and formatters: a change of scale replaces them.
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low / margin, high * margin)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    if chart.scale == "decay":
        axes.invert_yaxis()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.7g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return about three to eight round numbers between two bounds, which may hold a single power of ten."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [m * 10.0**exponent for exponent in exponents for m in mantissas if low <= m * 10.0**exponent <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _mark_steps(axes: Axes, chart: Chart) -> None:
    for i, step in enumerate(chart.restarts):
        axes.axvline(step, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), label=None if i else "resumed")
    if chart.skipped:
        axes.plot(
            chart.skipped,
            [0.03] * len(chart.skipped),
            transform=axes.get_xaxis_transform(),
            color=BAD,
            linestyle="none",
            marker="x",
            markersize=5,
            clip_on=False,
            label="update skipped",
        )


def _plain_number(value: float, _: object = None) -> str:
    """Return 0.001, 250, 1.5e-05: short, without offset or formula."""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _to_svg(figure: Figure, *, alt: str) -> str:
    stream = io.StringIO()
    # No metadata: the date would make two reports of one run differ.
    figure.savefig(stream, format="svg", dpi=160, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"), None))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Every figure numbers its groups from one; on one page ids must be unique.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # The font of the page, and no fixed size: a figure fills its card.
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


@dataclass(frozen=True)
class Field:
    """A field on a latitude-longitude grid, to be drawn as a map.

    Attributes
    ----------
    name : str
        Unique on its page.
    alt, title : str
        Description for screen readers, and the text above the map.
    values : np.ndarray
        Shape (latitude, longitude).
    latitudes, longitudes : np.ndarray
        Degrees, shapes (latitude,) and (longitude,).
    limits : tuple[float, float]
        Values at the ends of the colour scale.
    unit : str
        Text below the colour bar.
    diverging : bool
        The middle of the scale means zero.
    """

    name: str
    alt: str
    title: str
    values: np.ndarray
    latitudes: np.ndarray
    longitudes: np.ndarray
    limits: tuple[float, float]
    unit: str
    diverging: bool = False


def draw_map(field: Field) -> str:
    """Return a map as SVG: the whole globe in the Equal Earth projection, a region in plain degrees."""
    # West to east from the date line, which is the edge of the projection: a grid from 0 to 360 would be torn there.
    longitudes = (field.longitudes + 180) % 360 - 180
    order = np.argsort(longitudes)
    longitudes, values = longitudes[order], field.values[:, order]
    is_global = np.ptp(longitudes) > 300 and np.ptp(field.longitudes % 360) > 300
    project: Projection = equal_earth if is_global else _plain_degrees
    with matplotlib.rc_context({**RC, "svg.hashsalt": field.name, "axes.grid": False}):
        # Laid out by hand: with a fixed aspect the automatic layout cuts off the title.
        figure = Figure(figsize=(3.7, 2.53))
        axes = figure.add_axes((0.02, 0.215, 0.96, 0.68))
        axes.set_axis_off()
        x, y = project(*np.meshgrid(_edges(longitudes, 180), _edges(field.latitudes, 90)))
        colours = axes.pcolormesh(
            x,
            y,
            values,
            cmap="RdBu_r" if field.diverging else "viridis",
            norm=Normalize(*field.limits),
            # Ten thousand cells as vectors would be a megabyte.
            rasterized=True,
        )
        axes.set_xlim(x.min(), x.max())
        axes.set_ylim(y.min(), y.max())
        _draw_contours(axes, field, longitudes, values, project)
        _draw_coast(axes, project)
        if is_global:
            axes.set_aspect("equal")
            _draw_globe_edge(axes)
        axes.set_title(field.title, fontsize=8.5, color=INK)
        bar_axes = figure.add_axes((0.07, 0.165, 0.86, 0.03))
        bar = figure.colorbar(colours, cax=bar_axes, orientation="horizontal", extend="both")
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(_plain_number))
        bar.set_label(field.unit, color=MUTED)
        return _to_svg(figure, alt=field.alt)


Projection = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def equal_earth(longitudes: np.ndarray, latitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project degrees to the plane; equal areas stay equal.

    Source: Savric, Patterson and Jenny (2019), doi:10.1080/13658816.2018.1504949, equations 1 and 2.
    """
    a1, a2, a3, a4 = 1.340264, -0.081106, 0.000893, 0.003796
    theta = np.arcsin(np.sqrt(3) / 2 * np.sin(np.radians(latitudes)))
    slope = 9 * a4 * theta**8 + 7 * a3 * theta**6 + 3 * a2 * theta**2 + a1
    x = 2 * np.sqrt(3) * np.radians(longitudes) * np.cos(theta) / (3 * slope)
    return x, a4 * theta**9 + a3 * theta**7 + a2 * theta**3 + a1 * theta


def _plain_degrees(longitudes: np.ndarray, latitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return longitudes, latitudes


def _edges(centres: np.ndarray, limit: float) -> np.ndarray:
    middle = (centres[1:] + centres[:-1]) / 2
    # Clipped, because cells of a pole row would reach beyond the pole.
    ends = (centres[0] - (middle[0] - centres[0]), centres[-1] + (centres[-1] - middle[-1]))
    return np.clip(np.concatenate(([ends[0]], middle, [ends[1]])), -limit, limit)


def _draw_contours(axes: Axes, field: Field, longitudes: np.ndarray, values: np.ndarray, project: Projection) -> None:
    if field.diverging:
        return
    levels = MaxNLocator(12).tick_values(*field.limits)
    x, y = project(*np.meshgrid(longitudes, field.latitudes))
    axes.contour(x, y, values, levels=levels, colors="white", linewidths=0.5, alpha=0.55).set_rasterized(True)


def _draw_coast(axes: Axes, project: Projection) -> None:
    # Shipped with the package: cartopy downloads its coastlines, and compute nodes have no network.
    document = json.loads((Path(__file__).parent / "coastlines.geojson").read_text(encoding="utf-8"))
    lines = []
    for feature in document["features"]:
        for line in feature["geometry"]["coordinates"]:
            longitudes, latitudes = np.asarray(line, dtype=float).T
            lines.append(np.column_stack(project(longitudes, latitudes)))
    axes.add_collection(LineCollection(lines, colors="black", linewidths=0.4, alpha=0.8, rasterized=True))


def _draw_globe_edge(axes: Axes) -> None:
    latitudes = np.linspace(-90, 90, 91)
    for longitude in (-180.0, 180.0):
        axes.plot(*equal_earth(np.full(91, longitude), latitudes), color=MUTED, linewidth=0.7)
    for latitude in (-90.0, 90.0):
        axes.plot(*equal_earth(np.array([-180.0, 180.0]), np.full(2, latitude)), color=MUTED, linewidth=0.7)
