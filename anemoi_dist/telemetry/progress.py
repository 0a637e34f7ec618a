"""What rank 0 shows while a run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TextIO


@dataclass(frozen=True)
class StepLine:
    """What is shown of one optimizer step.

    Attributes
    ----------
    step : int
        Optimizer steps done.
    loss, lr, grad_norm : float
        As in :class:`anemoi_dist.engines.base.StepReport`.
    samples_per_s, eta_s : float or None
        Speed and time left; None until two steps are done.
    memory_bytes : int
        Memory of rank 0.
    skipped : bool
        The update was skipped.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_s: float | None
    eta_s: float | None
    memory_bytes: int
    skipped: bool = False

    def metrics(self) -> str:
        """Return everything but the step and the time left, in one line."""
        speed = "-" if self.samples_per_s is None else format_number(self.samples_per_s, digits=3)
        # The warning first: a narrow terminal cuts the end of the line.
        return ("UPDATE SKIPPED  " if self.skipped else "") + (
            f"loss {format_number(self.loss)}  rate {self.lr:.2e}  gradient {format_number(self.grad_norm, digits=3)}  "
            f"{speed} samples/s  {format_bytes(self.memory_bytes)}"
        )


class SpeedMeter:
    """Samples per second and time left, over a moving window that begins after the first step.

    The first step pays for start-up (compilation, connections, cold caches); none of that is extrapolated.

    Parameters
    ----------
    total_steps : int
        Optimizer steps of the whole run.
    window_steps : int, optional
        Steps that the speed is measured over.
    clock : Callable[[], float], optional
        Monotonic seconds.
    """

    def __init__(
        self, *, total_steps: int, window_steps: int = 50, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._ends: deque[tuple[float, int]] = deque(maxlen=window_steps + 1)
        self._num_steps = 0
        self._paused_at_first_s = self._paused_s = 0.0
        self.samples_per_s: float | None = None
        self.eta_s: float | None = None

    def add(self, step: int, *, num_samples: int, paused_s: float = 0.0) -> None:
        """Note that a step has ended.

        Parameters
        ----------
        step : int
            Optimizer steps done.
        num_samples : int
            Samples of this step, over all ranks.
        paused_s : float, optional
            Seconds so far that were not training (validation, checkpoints). They don't count in the speed; the time
            left assumes that they go on as often as until now.
        """
        if not self._ends:
            self._paused_at_first_s = paused_s
        self._paused_s = paused_s
        self._ends.append((self._clock() - paused_s, num_samples))
        self._num_steps += 1
        if len(self._ends) < 2:
            return
        seconds = max(self._ends[-1][0] - self._ends[0][0], 1e-9)
        self.samples_per_s = sum(count for _, count in list(self._ends)[1:]) / seconds
        pause_per_step_s = (self._paused_s - self._paused_at_first_s) / (self._num_steps - 1)
        step_s = seconds / (len(self._ends) - 1) + pause_per_step_s
        self.eta_s = max(self._total_steps - step, 0) * step_s


class Progress(Protocol):
    """A way of showing how far a run is."""

    def update(self, line: StepLine) -> None:
        """Show one optimizer step."""

    def message(self, text: str) -> None:
        """Show a text of one or more lines that stays."""

    def close(self) -> None:
        """Show the last state and give the terminal back."""


def open_progress(*, total_steps: int, first_step: int, interval_steps: int, stream: TextIO | None = None) -> Progress:
    """Return a bar where ``stream`` is a terminal, and plain lines elsewhere.

    Parameters
    ----------
    total_steps : int
        Optimizer steps of the whole run.
    first_step : int
        Optimizer steps done before.
    interval_steps : int
        Steps between two plain lines.
    stream : TextIO, optional
        Standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    log = getattr(stream, "log", None)
    if not stream.isatty():
        return PlainProgress(total_steps=total_steps, interval_steps=interval_steps, stream=stream)
    plain = None if log is None else PlainProgress(total_steps=total_steps, interval_steps=interval_steps, stream=log)
    if os.environ.get("TERM", "dumb") == "dumb":
        screen: Progress = PlainProgress(total_steps=total_steps, interval_steps=interval_steps, stream=stream)
    else:
        screen = BarProgress(total_steps=total_steps, first_step=first_step, stream=stream)
    return screen if plain is None else Both(screen, plain)


class Both:
    """What is shown on a terminal, and as plain lines in the log beside it."""

    def __init__(self, screen: Progress, log: Progress) -> None:
        self._screen, self._log = screen, log

    def update(self, line: StepLine) -> None:  # noqa: D102
        self._screen.update(line)
        self._log.update(line)

    def message(self, text: str) -> None:  # noqa: D102
        self._screen.message(text)
        self._log.message(text)

    def close(self) -> None:  # noqa: D102
        self._screen.close()
        self._log.close()


class PlainProgress:
    """One line every few steps, flushed, for logs and pipes."""

    def __init__(self, *, total_steps: int, interval_steps: int, stream: TextIO) -> None:
        self._total_steps, self._interval_steps, self._stream = total_steps, interval_steps, stream

    def update(self, line: StepLine) -> None:  # noqa: D102
        if line.step % self._interval_steps and line.step != self._total_steps and not line.skipped:
            return
        width = len(str(self._total_steps))
        self.message(f"step {line.step:>{width}}/{self._total_steps}  {line.metrics()}  {format_time_left(line.eta_s)}")

    def message(self, text: str) -> None:  # noqa: D102
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:  # noqa: D102
        self._stream.flush()


class BarProgress:
    """A bar with the metrics below it; messages, and whatever else is printed, appear above."""

    def __init__(self, *, total_steps: int, first_step: int, stream: TextIO) -> None:
        # Only here: a log file needs none of rich, and its import takes a tenth of a second.
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[time_left]}"),
            console=Console(file=stream),
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, time_left="starting")
        self._metrics = Text("", no_wrap=True, overflow="ellipsis")
        self._live: Any = Live(Group(self._bar, self._metrics), console=self._bar.console, refresh_per_second=4)
        self._live.start()

    def update(self, line: StepLine) -> None:  # noqa: D102
        self._metrics.plain = line.metrics()
        self._metrics.style = "bold red" if line.skipped else ""
        self._bar.update(self._task, completed=line.step, time_left=format_time_left(line.eta_s))

    def message(self, text: str) -> None:  # noqa: D102
        # No markup: a table may hold square brackets.
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:  # noqa: D102
        self._live.stop()


def format_number(value: float, *, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits, plain where that is short: ``0.4312``, ``1.3e-05``."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        magnitude = 0 if value == 0 else math.floor(math.log10(abs(value)))
        return f"{value:.{min(max(digits - 1 - magnitude, 0), digits)}f}"
    return f"{value:.{digits - 1}e}"


def format_bytes(num_bytes: float) -> str:
    """Return a size in the largest binary unit that it fills: ``512 MiB``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Return ``0:07``, ``12:34``, ``3:00:00`` or ``2 d 03:00``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def format_time_left(eta_s: float | None) -> str:
    """Return the time left as it is shown, also where it is not known yet."""
    return "time left -" if eta_s is None else f"{format_duration(eta_s)} left"
