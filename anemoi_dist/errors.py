"""Exceptions with their data and exit codes. No torch: both sides use it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of this product. Schedulers and scripts rely on these numbers; they do not change."""

    FINISHED = 0
    CONFIGURATION = 2
    PREFLIGHT = 3
    NO_CHECKPOINT = 4
    DIVERGED = 5
    HANG = 6
    INTERNAL = 70
    SAVED_RUN_AGAIN = 75
    INTERRUPTED = 130


def print_error(error: object) -> None:
    """Print an error on stderr as every command and every rank does."""
    print_message(f"anemoi-dist: {error}")


def print_message(text: str) -> None:
    """Print a line on stderr at once: ranks share it, and their launcher may end before a buffer is flushed."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class AnemoiDistError(Exception):
    """Base of every error that this product raises on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL


class ConfigError(AnemoiDistError, ValueError):
    """A value the user gave breaks a rule.

    Parameters
    ----------
    key : str
        The configuration key or argument at fault, as the user would write it.
    value : Any
        What was given.
    rule : str
        What must hold.
    fix : str
        What to write instead.
    valid : Iterable[str], optional
        The valid names, where the value had to be one of them; the nearest is suggested.
    """

    exit_code = ExitCode.CONFIGURATION

    def __init__(self, key: str, value: Any, rule: str, *, fix: str = "", valid: Iterable[str] = ()) -> None:
        self.key, self.value, self.rule, self.fix, self.valid = key, value, rule, fix, tuple(valid)
        super().__init__(self.__str__())

    # Errors travel between processes (workers of the data loader, pools of tests). By default pickle would call the
    # class with the message alone.
    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_config_error, (type(self), self.key, self.value, self.rule, self.fix, self.valid))

    def __str__(self) -> str:
        lines = [f"{self.key}={self.value!r}: {self.rule}"]
        if near := difflib.get_close_matches(str(self.value), self.valid, n=3, cutoff=0.6):
            lines.append(f"  nearest: {', '.join(near)}")
        if self.valid:
            lines.append(f"  valid: {', '.join(self.valid)}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def _rebuild_config_error(
    cls: type[ConfigError], key: str, value: Any, rule: str, fix: str, valid: tuple[str, ...]
) -> ConfigError:
    return cls(key, value, rule, fix=fix, valid=valid)


class PreflightError(AnemoiDistError):
    """The machine, not the configuration, is at fault: no device, no disk, no port."""

    exit_code = ExitCode.PREFLIGHT


class CheckpointError(AnemoiDistError):
    """No checkpoint can be loaded, or one that must be is damaged or does not fit."""

    exit_code = ExitCode.NO_CHECKPOINT


class DivergedError(AnemoiDistError):
    """Too many updates in a row had a loss or gradient that is not finite.

    Parameters
    ----------
    num_skipped : int
        Updates skipped in a row.
    step : int
        Optimizer step at which training stopped.
    """

    exit_code = ExitCode.DIVERGED

    def __init__(self, num_skipped: int, step: int) -> None:
        self.num_skipped, self.step = num_skipped, step
        super().__init__(
            f"{num_skipped} updates in a row had a loss or gradient that is not finite; stopped at step {step}. "
            "What was saved is intact: lower training.lr.rate, lengthen training.lr.warmup or set "
            "training.clip_grad_norm, and start again (training.max_skipped sets the limit)."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.num_skipped, self.step))


class StopRequestedError(AnemoiDistError):
    """The run saved and left because it was asked to; running it again continues it.

    Parameters
    ----------
    step : int
        The optimizer step that was saved.
    reason : str
        What asked: a signal's name, the stop file, or what that says.
    """

    exit_code = ExitCode.SAVED_RUN_AGAIN

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        # After a time limit the launcher says whether the job goes back into the queue, so no advice is given here.
        message = f"saved step {step}: {reason}"
        if not reason.startswith("time limit"):
            message = f"stopped by {reason} after saving step {step}; run the same command again to continue"
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.step, self.reason))
