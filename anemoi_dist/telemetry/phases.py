"""Time spent in each phase of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("startup", "data", "step", "validation", "checkpoint")


class PhaseTimer:
    """Adds up the seconds spent in each phase, on a monotonic clock.

    A phase inside another one stops the outer's clock, so that the phases never add up to more than the time passed.

    Parameters
    ----------
    clock : Callable[[], float], optional
        Monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._running: list[str] = []
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as ``name``.

        Raises
        ------
        ValueError
            ``name`` is not one of :data:`PHASES`.
        """
        if name not in self._seconds:
            raise ValueError(f"phase {name!r} is not one of {', '.join(PHASES)}")
        self._account()  # the time until here belongs to the outer phase
        self._running.append(name)
        try:
            yield
        finally:
            self._account()
            self._running.pop()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase so far, including a running one."""
        self._account()  # the end event of a failed run is written inside its phase
        return dict(self._seconds)

    def _account(self) -> None:
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
