"""Scores of forecasts: records, a table, metrics by name, and a summary for the retention of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """RMSE and ACC of one forecast of one variable at one lead time.

    Attributes
    ----------
    forecast : str
        ``model`` or the name of a baseline.
    variable : str
        Name of the variable.
    lead_s : int
        Seconds from the last input state.
    rmse : float
        Root mean squared error over area, ensemble and samples, in the variable's unit.
    acc : float or None
        Mean over samples of the correlation of forecast and true anomaly, both from the training split's climatology
        and weighted by area. None where there is no anomaly to correlate, as for the climatology itself.
    """

    forecast: str
    variable: str
    lead_s: int
    rmse: float
    acc: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the score as a ``validation`` event holds it."""
        return asdict(self)


def format_table(scores: Sequence[Score]) -> str:
    """Return a plain-text table: a row for each variable and lead time, RMSE and ACC of all forecasts side by side."""
    # In order of appearance: the model first, as the validator returns it.
    names = list(dict.fromkeys(score.forecast for score in scores))
    rows: dict[tuple[str, int], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault((score.variable, score.lead_s), {})[score.forecast] = score
    width = max(8, *(len(variable) for variable, _ in rows))
    columns = [max(7, len(name)) for name in names]
    group_width = sum(columns) + 2 * len(columns)
    header = "".join(f"  {name:>{size}}" for name, size in zip(names, columns, strict=True))
    lines = [
        f"{'':{width}}  {'':>6} {'  RMSE':{group_width}} {'  ACC':{group_width}}".rstrip(),
        f"{'variable':{width}}  {'lead':>6} {header} {header}",
    ]
    for (variable, lead_s), row in rows.items():
        rmse = "".join(f"  {row[name].rmse:>{size}.4g}" for name, size in zip(names, columns, strict=True))
        acc = "".join(f"  {_acc(row[name].acc):>{size}}" for name, size in zip(names, columns, strict=True))
        lines.append(f"{variable:{width}}  {lead_s / 3600:>4g} h {rmse} {acc}")
    return "\n".join(lines)


def _acc(acc: float | None) -> str:
    return "-" if acc is None else f"{acc:.3f}"


def metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Return every score that is a number by its name, such as ``rmse/msl/model/6h``."""
    return {
        f"{kind}/{score.variable}/{score.forecast}/{score.lead_s / 3600:g}h": value
        for score in scores
        for kind, value in (("rmse", score.rmse), ("acc", score.acc))
        if value is not None
    }


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Reduce the scores of one validation to one number for each of :data:`~anemoi_dist.config.schema.SAVE_METRICS`.

    ``rmse`` is the model's RMSE over that of persistence, ``acc`` its anomaly correlation; both averaged over variables
    and lead times, so that units cancel.
    """
    model = [score for score in scores if score.forecast == "model"]
    persistence = {(s.variable, s.lead_s): s.rmse for s in scores if s.forecast == "persistence"}
    # A persistence without error (a constant variable) cannot be compared with.
    ratios = [s.rmse / persistence[s.variable, s.lead_s] for s in model if persistence.get((s.variable, s.lead_s))]
    correlations = [score.acc for score in model if score.acc is not None]
    summary = {}
    if ratios:
        summary["rmse"] = sum(ratios) / len(ratios)
    if correlations:
        summary["acc"] = sum(correlations) / len(correlations)
    # NaN compares as neither better nor worse: retention could keep a diverged checkpoint as its best.
    return {name: value for name, value in summary.items() if math.isfinite(value)}
