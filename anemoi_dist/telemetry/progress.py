"""Progress of a run as rank 0 shows it: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO


@dataclass(frozen=True)
class StepLine:
    """One optimizer step as shown to the user.

    Attributes
    ----------
    step : int
        Optimizer steps done.
    loss, lr, grad_norm : float
        As in :class:`anemoi_dist.engines.base.StepReport`.
    samples_per_s, eta_s : float or None
        Speed and time left; None until two steps are done.
    memory_bytes : int
        Memory used by rank 0.
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
        # The warning comes first, because a narrow terminal cuts the end of the line.
        return ("UPDATE SKIPPED  " if self.skipped else "") + (
            f"loss {format_number(self.loss)}  rate {self.lr:.2e}  gradient {format_number(self.grad_norm, digits=3)}  "
            f"{speed} samples/s  {format_bytes(self.memory_bytes)}"
        )


class SpeedMeter:
    """Samples per second and time left, over a moving window that begins after the first step.

    The first step includes start-up (compilation, connections, cold caches), which must not be extrapolated.

    Parameters
    ----------
    total_steps : int
        Optimizer steps of the whole run.
    window_steps : int, optional
        Length of the moving window.
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
            Seconds so far spent on validation and checkpoints. They do not count in the speed; the time left assumes
            that they continue at the same rate.
        """
        if not self._ends:
            self._paused_at_first_s = paused_s
        self._paused_s = paused_s
        self._ends.append((self._clock() - paused_s, num_samples))
        self._num_steps += 1
        # The end of the first step only opens the window.
        if len(self._ends) < 2:
            return
        seconds = max(self._ends[-1][0] - self._ends[0][0], 1e-9)  # a coarse clock may give 0 for tiny steps
        # The first entry's samples were read before the window began.
        self.samples_per_s = sum(count for _, count in list(self._ends)[1:]) / seconds
        pause_per_step_s = (self._paused_s - self._paused_at_first_s) / (self._num_steps - 1)
        step_s = seconds / (len(self._ends) - 1) + pause_per_step_s
        self.eta_s = max(self._total_steps - step, 0) * step_s


class Progress(Protocol):
    """Display of a run's progress."""

    def update(self, line: StepLine) -> None:
        """Show one optimizer step."""

    def message(self, text: str) -> None:
        """Show a text of one or more lines that is not overwritten."""

    def close(self) -> None:
        """Show the last state and restore the terminal."""


def open_progress(*, total_steps: int, first_step: int, interval_steps: int, stream: TextIO | None = None) -> Progress:
    """Return a bar if ``stream`` is a terminal, and plain lines otherwise.

    Parameters
    ----------
    total_steps : int
        Optimizer steps of the whole run.
    first_step : int
        Optimizer steps done before.
    interval_steps : int
        Steps between two plain lines.
    stream : TextIO, optional
        Standard output by default. The ``log`` of a :class:`~anemoi_dist.telemetry.console.LoggedStream` on a terminal
        gets plain lines of its own.
    """
    stream = sys.stdout if stream is None else stream

    def plain(target: TextIO) -> Progress:
        return PlainProgress(total_steps=total_steps, interval_steps=interval_steps, stream=target)

    if not stream.isatty():
        return plain(stream)
    # Editors and some CI systems offer a terminal that cannot move the cursor: a bar would print its control codes.
    if os.environ.get("TERM", "dumb") == "dumb":
        screen = plain(stream)
    else:
        screen = BarProgress(total_steps=total_steps, first_step=first_step, stream=stream)
    log: TextIO | None = getattr(stream, "log", None)
    return screen if log is None else TeeProgress(screen, plain(log))


class TeeProgress(Progress):
    """Two displays at once: the terminal, and plain lines in its log."""

    def __init__(self, screen: Progress, log: Progress) -> None:
        self._displays = (screen, log)

    def update(self, line: StepLine) -> None:
        """Show one optimizer step on both."""
        for display in self._displays:
            display.update(line)

    def message(self, text: str) -> None:
        """Show a text on both."""
        for display in self._displays:
            display.message(text)

    def close(self) -> None:
        """Close both, the terminal first."""
        for display in self._displays:
            display.close()


class PlainProgress(Progress):
    """One line every few steps, flushed, for logs and pipes."""

    def __init__(self, *, total_steps: int, interval_steps: int, stream: TextIO) -> None:
        self._total_steps, self._interval_steps, self._stream = total_steps, interval_steps, stream
        self._has_updated = False

    def update(self, line: StepLine) -> None:
        """Write a line for the first step of this attempt, every ``interval_steps``, the last, and skipped updates."""
        # With a long interval, the first line is the only sign for minutes that start-up is over and training works.
        is_due = not self._has_updated or line.step % self._interval_steps == 0 or line.step == self._total_steps
        self._has_updated = True
        if is_due or line.skipped:
            step = f"{line.step:>{len(str(self._total_steps))}}"
            self.message(f"step {step}/{self._total_steps}  {line.metrics()}  {format_time_left(line.eta_s)}")

    def message(self, text: str) -> None:
        """Write a text and flush it."""
        self._stream.write(text + "\n")
        # Pipes are block-buffered: without this a log would lag by kilobytes, and lose them if the process is killed.
        self._stream.flush()

    def close(self) -> None:
        """Flush the stream, which stays open."""
        self._stream.flush()


class BarProgress(Progress):
    """A bar with the metrics below it; messages, and whatever else is printed, appear above."""

    def __init__(self, *, total_steps: int, first_step: int, stream: TextIO) -> None:
        # Imported here: plain logs need none of rich, and its import takes a tenth of a second.
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
        # One Live for both: two of them on one terminal would overwrite each other.
        self._live = Live(Group(self._bar, self._metrics), console=self._bar.console, refresh_per_second=4)
        self._live.start()

    def update(self, line: StepLine) -> None:
        """Move the bar and replace the metrics."""
        self._metrics.plain = line.metrics()
        self._metrics.style = "bold red" if line.skipped else ""
        self._bar.update(self._task, completed=line.step, time_left=format_time_left(line.eta_s))

    def message(self, text: str) -> None:
        """Print a text above the bar."""
        # No markup: a table may hold square brackets, which rich would take for styles.
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the bar once more and show the cursor again."""
        self._live.stop()


def format_number(value: float, *, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits, without exponent if short: ``0.4312``, ``1.3e-05``."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        magnitude = 0 if value == 0 else math.floor(math.log10(abs(value)))
        return f"{value:.{min(max(digits - 1 - magnitude, 0), digits)}f}"
    return f"{value:.{digits - 1}e}"


def format_bytes(num_bytes: float) -> str:
    """Return a size in the largest binary unit that it reaches: ``512 MiB``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Return ``0:07``, ``12:34``, ``3:00:00`` or ``2 d 03:00``."""
    minutes, second = divmod(round(seconds), 60)  # rounded first: 59.7 s must become 1:00, not 0:60
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def format_time_left(eta_s: float | None) -> str:
    """Return ``12:34 left``, or ``time left -`` while it is not known."""
    return "time left -" if eta_s is None else f"{format_duration(eta_s)} left"
