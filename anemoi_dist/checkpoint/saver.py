"""Asynchronous saving: training pauses only for a copy; a thread writes, the control word says when to commit."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial

from anemoi_dist.checkpoint.manifest import Origin, TrainerState
from anemoi_dist.checkpoint.ranks import Ranks
from anemoi_dist.checkpoint.retention import Policy, prune
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.staging import Staging, check_host_memory, required_bytes
from anemoi_dist.checkpoint.store import Folder, Store
from anemoi_dist.checkpoint.worker import Job, Worker
from anemoi_dist.checkpoint.writer import SaveCancelledError, begin, commit, write_rank
from anemoi_dist.config.schema import CheckpointConfig
from anemoi_dist.distributed.control_word import Word
from anemoi_dist.errors import CheckpointError


@dataclass(frozen=True)
class Outcome:
    """How a save ended. The same on every rank but for ``name``, ``deleted_steps`` and ``note``, which rank 0 knows.

    Attributes
    ----------
    step : int
        The optimizer step that was to be saved.
    error : str
        Why there is no checkpoint of it; empty where there is one.
    skipped : bool
        It was not tried, because the one before was not done.
    name : str
        The checkpoint's name in its store.
    deleted_steps : list[int]
        Checkpoints that the retention has deleted after it.
    note : str
        Why the retention could not delete.
    seconds : float
        From the copy to the end.
    stalled_s : float
        How long training stood still.
    """

    step: int
    error: str = ""
    skipped: bool = False
    name: str = ""
    deleted_steps: list[int] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0
    stalled_s: float = 0.0


class _Phase(Enum):
    WRITING = 1
    COMMITTING = 2


@dataclass
class _PendingSave:
    """The save that is under way."""

    number: int
    step: int
    save_id: str
    folder: Folder
    trainer: TrainerState
    samples_seen: int
    cancel: threading.Event
    job: Job
    phase: _Phase
    begun: float
    stalled_s: float = 0.0
    waiting_since: float | None = None


class Saver:
    """Saves on all ranks, at most one save at a time.

    Every method but :meth:`word` is collective. A save has two phases, each ended by what the control word brings.
    First every rank writes its file in its thread. When all have written, rank 0 gathers their reports and commits in
    its thread; when one has failed, all give up together.

    Parameters
    ----------
    store : Store
        Where checkpoints live; every rank sees the same.
    world : Ranks
        The ranks that save.
    config : CheckpointConfig
        How to save, what to keep and what a failure means.
    origin : Origin
        The program that saves, for the manifest.
    report : Callable[[Outcome], None], optional
        Called on every rank, at a step boundary, with how each save ended. It is an attribute too: whoever is handed a
        saver sets it before the first save.
    broken : Collection[int], optional
        Steps whose checkpoints failed verification at the start.
    """

    def __init__(
        self,
        store: Store,
        *,
        world: Ranks,
        config: CheckpointConfig,
        origin: Origin,
        report: Callable[[Outcome], None] = lambda outcome: None,
        broken: Collection[int] = (),
    ) -> None:
        self._store, self._world, self._config, self._origin = store, world, config, origin
        self.report, self._broken = report, set(broken)
        self._policy = Policy(config.keep_last, config.keep_every, config.keep_best)
        self._worker = Worker()
        self._staging: Staging | None = None
        self._pending: _PendingSave | None = None
        self._number = 0

    def prepare(self, shards: Iterable[Shard]) -> None:
        """Allocate what staging needs, before the first step.

        Raises
        ------
        PreflightError
            It does not fit into the memory of some machine.
        """
        if not self._config.asynchronous:
            return
        # Before the first step: a run that can never save should not train for hours to find out.
        held = list(shards)
        check_host_memory(required_bytes(held), world=self._world)
        self._staging = Staging(held, device=self._world.device)

    def save(
        self, step: int, shards: Callable[[], Iterable[Shard]], *, samples_seen: int, trainer: TrainerState
    ) -> None:
        """Begin to save ``step``; without ``checkpoint.asynchronous``, save it.

        Raises
        ------
        CheckpointError
            This save, or the one that was under way, has failed and ``checkpoint.on_error`` is ``stop``.
        """
        begun = time.monotonic()
        if self._pending is not None and self._config.when_busy == "skip":
            self.report(Outcome(step, skipped=True))
            return
        self.wait()
        # Counted up on every rank, whether or not the save begins: the control word compares these numbers, and ranks
        # that disagree on them would wait for each other for ever.
        self._number += 1
        try:
            folder, save_id = begin(self._store, step, world=self._world)
        except CheckpointError as error:
            self._conclude(Outcome(step, error=str(error)))
            return
        cancel = threading.Event()
        job = self._write(folder, save_id, shards, cancel)
        self._pending = _PendingSave(
            self._number, step, save_id, folder, trainer, samples_seen, cancel, job, _Phase.WRITING, begun
        )
        if self._staging is None:
            self.wait()
        else:
            self._pending.stalled_s = time.monotonic() - begun

    def word(self, *, stop: int, save_due: bool) -> Word:
        """Return what this rank has to tell the others; asks nobody and waits for nothing."""
        flight = self._pending
        # `written` says up to which save this rank has nothing left to write. The ranks take the minimum of it and the
        # maximum of the others, so that one number each is enough for any number of ranks.
        if flight is None or not flight.job.is_done:
            written = self._number if flight is None or flight.phase is _Phase.COMMITTING else self._number - 1
            return Word(stop=stop, save_due=save_due, written=written)
        if flight.job.error is not None:
            return Word(stop=stop, save_due=save_due, written=self._number - 1, failed=self._number)
        committed = self._number if flight.phase is _Phase.COMMITTING and self._world.is_main else 0
        return Word(stop=stop, save_due=save_due, written=self._number, committed=committed)

    def advance(self, agreed: Word) -> None:
        """Do what the ranks have agreed on: commit, give up, or continue.

        Raises
        ------
        CheckpointError
            The save has failed and ``checkpoint.on_error`` is ``stop``.
        """
        if self._pending is None:
            return
        failed = agreed.failed >= self._pending.number
        if self._pending.phase is _Phase.WRITING and (failed or agreed.written >= self._pending.number):
            if failed:
                self._pending.cancel.set()  # before waiting: the other ranks need not finish gigabytes for nothing
            self._gather()
        elif self._pending.phase is _Phase.COMMITTING and (failed or agreed.committed >= self._pending.number):
            self._finish()

    def wait(self) -> None:
        """Bring the save under way to its end.

        Raises
        ------
        CheckpointError
            It has failed and ``checkpoint.on_error`` is ``stop``.
        """
        if self._pending is None:
            return
        self._pending.waiting_since = time.monotonic()
        if self._pending.phase is _Phase.WRITING:
            self._gather()
        if self._pending is not None:
            self._finish()

    # In the thread

    def _write(
        self, folder: Folder, save_id: str, shards: Callable[[], Iterable[Shard]], cancel: threading.Event
    ) -> Job:
        try:
            held = self._staging.copy(shards()) if self._staging is not None else list(shards())
        except MemoryError as error:  # on this rank alone, perhaps: the others learn it like any failure to write
            return Job.failed(error)
        return self._worker.submit(
            partial(
                write_rank,
                folder,
                held,
                save_id=save_id,
                rank=self._world.rank,
                read_back=self._config.read_back,
                cancelled=cancel.is_set,
            )
        )

    def _commit(self, flight: _PendingSave, reports: list[str]) -> str:
        name = commit(
            self._store,
            flight.folder,
            reports,
            save_id=flight.save_id,
            step=flight.step,
            samples_seen=flight.samples_seen,
            origin=self._origin,
            trainer=flight.trainer,
        )
        # A step whose old checkpoint was broken has been trained and saved again: from now on it counts.
        self._broken.discard(flight.step)
        deleted, note = [], ""
        try:
            deleted = prune(self._store, self._policy, broken=self._broken)
        except OSError as error:  # the checkpoint is committed all the same: no reason to report the save as failed
            note = f"older checkpoints could not be deleted: {error}"
        return json.dumps({"name": name, "deleted_steps": deleted, "note": note})

    # At a step boundary

    def _gather(self) -> None:
        """Learn how writing went everywhere, then give up or have rank 0 commit."""
        flight = self._pending
        assert flight is not None, "a save is under way"
        flight.job.wait()
        # Rank 0 decides for all. If each rank judged by its own error, some would go on to commit while others gave up,
        # and the next collective would pair different operations.
        errors = self._world.gather_text(_text(flight.job.error, rank=self._world.rank))
        failure = self._world.broadcast_text("; ".join(filter(None, errors)) if self._world.is_main else None)
        if failure:
            self._give_up(failure)
            return
        reports = self._world.gather_text(flight.job.result)
        flight.phase = _Phase.COMMITTING
        if self._world.is_main:
            flight.job = self._worker.submit(partial(self._commit, flight, reports))

    def _finish(self) -> None:
        """Learn from rank 0 how the commit went."""
        flight = self._pending
        assert flight is not None, "a save is under way"
        error = None
        if self._world.is_main:
            flight.job.wait()
            error = _text(flight.job.error, rank=0)
        failure = self._world.broadcast_text(error)
        if failure:
            self._give_up(failure)
            return
        known = json.loads(flight.job.result) if self._world.is_main else {}
        self._conclude(Outcome(flight.step, **known), flight)

    def _give_up(self, error: str) -> None:
        flight = self._pending
        assert flight is not None, "a save is under way"
        if self._world.is_main:  # every rank's thread has ended by now: nobody writes into what is removed
            self._store.discard(flight.folder)
        text = f"step {flight.step} was not saved: {error}; older checkpoints are intact"
        self._conclude(Outcome(flight.step, error=text), flight)

    def _conclude(self, outcome: Outcome, flight: _PendingSave | None = None) -> None:
        self._pending = None  # first: `report` may raise, and the next save must not wait for this one
        if flight is not None:
            now = time.monotonic()
            waited_s = 0.0 if flight.waiting_since is None else now - flight.waiting_since
            outcome = replace(outcome, seconds=now - flight.begun, stalled_s=flight.stalled_s + waited_s)
        self.report(outcome)
        if outcome.error and self._config.on_error == "stop":
            raise CheckpointError(outcome.error)


def _text(error: BaseException | None, *, rank: int) -> str:
    """Return a failure as text for all ranks; empty for none, and for a cancellation, which follows another's."""
    if error is None or isinstance(error, SaveCancelledError):
        return ""
    known = isinstance(error, OSError | CheckpointError)
    return f"rank {rank}: {error}" if known else f"rank {rank}: {type(error).__name__}: {error}"
