"""Agreement of ranks on stopping and saving: one small all-reduce that overlaps the next step."""

from __future__ import annotations

import signal
import threading
from dataclasses import astuple, dataclass
from types import FrameType

import torch
import torch.distributed as dist

from anemoi_dist.distributed.world import World
from anemoi_dist.process.output import LOSSES
from anemoi_dist.run.directory import RunDirectory

STOP_FILE = "the stop file"
#: Reasons to stop, by their number in the control word; the largest wins.
REASONS = {1: STOP_FILE, 2: "SIGINT", 3: "SIGUSR1", 4: "SIGTERM"}
_SIGNALS = {signal.SIGINT: 2, signal.SIGUSR1: 3, signal.SIGTERM: 4}


class StopRequest:
    """A stop request to this rank. The signal handlers only set a number; nothing is saved inside them.

    Parameters
    ----------
    run : RunDirectory
        Its stop file is a request too. Only rank 0 looks for it: polling by all ranks would load the file system.
    is_main : bool
        Whether this is rank 0.
    """

    def __init__(self, run: RunDirectory, *, is_main: bool) -> None:
        self._run, self._is_main = run, is_main
        self._signalled = 0

    def listen(self) -> None:
        """Install the signal handlers; a second SIGINT interrupts at once."""
        # Python sets handlers in the main thread only; elsewhere (tests, notebooks) the stop file still works.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signalled == _SIGNALS[signal.SIGINT]:
            raise KeyboardInterrupt
        self._signalled = max(self._signalled, _SIGNALS[signal.Signals(number)])

    def value(self) -> int:
        """Return the number of the reason to stop, 0 for none."""
        if self._is_main and not self._signalled and self._run.stop_file.exists():
            return 1
        return self._signalled

    def reason(self, agreed: int) -> str:
        """Return the reason for the stop that the ranks agreed on; for a stop file its first line, if it has one."""
        if self._is_main and REASONS[agreed] == STOP_FILE:
            try:
                said = self._run.stop_file.read_text(encoding="utf-8", errors="replace").strip()
            except OSError:  # gone in the meantime
                said = ""
            return said.partition("\n")[0] or STOP_FILE
        return REASONS[agreed]

    def clear(self) -> None:
        """Delete the stop file of a request that was met, or the next start would stop at once."""
        if not self._is_main:
            return
        try:
            self._run.stop_file.unlink(missing_ok=True)
        except OSError as error:  # a file system that became read-only; the next start deletes it too
            LOSSES.note(str(self._run.stop_file), error)


@dataclass(frozen=True)
class Word:
    """The numbers that ranks exchange once a step: all learn the largest of each, but of ``written`` the smallest.

    Attributes
    ----------
    stop : int
        A key of :data:`REASONS`, 0 for none.
    save_due : int
        1 if ``checkpoint.interval_minutes`` have passed on rank 0's clock.
    written : int
        The latest save, counted from 1, whose file this rank has synchronized to disk.
    failed : int
        The latest save that this rank could not write or commit.
    committed : int
        The latest save that rank 0 has committed.
    """

    stop: int = 0
    save_due: int = 0
    written: int = 0
    failed: int = 0
    committed: int = 0


#: Index of the one number that is a minimum: negated, it can be part of the same max-reduction.
_WRITTEN = 2


class ControlWord:
    """The exchange of :class:`Word`: started at the end of a step, read at the end of the next.

    Parameters
    ----------
    world : World
        The ranks; its control group is on the CPU, so the word never waits for a GPU.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._word = torch.zeros(len(astuple(Word())), dtype=torch.int64)
        self._pending: dist.Work | None = None

    def exchange(self, word: Word) -> Word:
        """Send this rank's word and return what the ranks agreed on one step ago."""
        # The one sent a step ago has arrived by now: nobody waits, at the price of learning a step late.
        agreed = self.finish()
        self._word.copy_(torch.tensor(astuple(word)))
        self._word[_WRITTEN].neg_()
        self._pending = dist.all_reduce(
            self._word, op=dist.ReduceOp.MAX, group=self._world.control_group, async_op=True
        )
        return agreed

    def finish(self) -> Word:
        """Wait for the exchange in progress and return its word; an empty word if there is none."""
        if self._pending is None:
            return Word()
        self._pending.wait()
        self._pending = None
        self._word[_WRITTEN].neg_()
        return Word(*self._word.tolist())
