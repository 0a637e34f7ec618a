"""The loop, with an engine that only counts: when it validates, saves, stops and gives up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import toy
from support.saving import ORIGIN

from anemoi_dist.checkpoint import saver as saver_module
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Saver
from anemoi_dist.checkpoint.shard import Shard, WholeTensors
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.distributed.control_word import REASONS
from anemoi_dist.distributed.world import seed_step
from anemoi_dist.engines.base import StepReport
from anemoi_dist.errors import CheckpointError, ConfigError, DivergedError, StopRequestedError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.base import Evaluate, Evaluation, Start
from anemoi_dist.training.trainer import SaveClock, Trainer


class CountingEngine:
    def __init__(self, *, bad_steps: set[int]) -> None:
        self.bad_steps, self.count, self.draws = bad_steps, torch.zeros(1), []
        self.is_averaged = False

    def train_step(self, micro_batches: Any) -> StepReport:
        assert not self.is_averaged
        self.count += 1
        self.draws.append(torch.rand(()).item())
        bad = int(self.count) in self.bad_steps
        return StepReport(loss=math.nan if bad else 1.0, grad_norm=1.0, lr=0.1, skipped=bad)

    def shards(self) -> Iterator[Shard]:
        assert not self.is_averaged
        yield Shard("count", "param", (1,), 0, self.count)

    def load(self, source: Checkpoint, *, num_updates: int) -> None:
        source.read("count", "param", start=0, out=self.count)
        assert int(self.count) == num_updates

    def schedule_values(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        self.is_averaged = True
        yield
        self.is_averaged = False

    def evaluate(self, batch: Any, **evaluation: Any) -> torch.Tensor:
        assert self.is_averaged
        return self.count


class CountingTask:
    """Counts what it is asked for, and remembers the count."""

    def __init__(self) -> None:
        self.num_evaluated, self.summary = 0, {}
        self.begun: list[int] = []
        self.after_saves: list[tuple[int, list[int]]] = []

    def begin_step(self, step: int) -> None:
        self.begun.append(step)

    def after_save(self, step: int, *, run: RunDirectory, **_: Any) -> list[str]:
        self.after_saves.append((step, LocalStore(run.path).steps()))
        return [f"beside {step}"]

    def evaluate(self, split: str, *, evaluate: Evaluate, **_: Any) -> Evaluation:
        evaluate(None)
        self.num_evaluated += 1
        self.draw = torch.rand(()).item()
        return Evaluation(summary=self.summary)

    def state_dict(self) -> dict[str, Any]:
        return {"num_evaluated": self.num_evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_evaluated = state.get("num_evaluated", 0)


class Recorder:
    """A recorder that remembers."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDirectory(folder)
        self.events: list[tuple[str, int]] = []
        self.steps: list[int] = []
        self.messages: list[str] = []
        self.scored: list[tuple[str, int]] = []

    def validation(self, step: int, split: str, evaluation: Evaluation) -> None:
        self.scored.append((split, step))

    def event(self, name: str, *, step: int, **fields: Any) -> None:
        self.events.append((name, step))

    def step(self, step: int, report: StepReport, **_: Any) -> None:
        self.steps.append(step)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def phase(self, name: str) -> Any:
        return nullcontext()


class Wish:
    """A stop request that comes at a given step."""

    def __init__(self, recorder: Recorder, *, at_step: int | None) -> None:
        self.recorder, self.at_step, self.cleared = recorder, at_step, False

    def value(self) -> int:
        return 4 if self.at_step is not None and len(self.recorder.steps) >= self.at_step else 0

    def reason(self, agreed: int) -> str:
        return REASONS[agreed]

    def clear(self) -> None:
        self.cleared = True


def make(
    world: Any,
    folder: Path,
    *,
    bad_steps: set[int] = frozenset(),
    stop_at: int | None = None,
    checkpoint: dict[str, Any] | None = None,
    **training: Any,
):
    config = toy.make_config("ddp", max_steps=10, max_skipped=2, **training)
    config.checkpoint.interval_steps, config.checkpoint.keep_last = 4, None
    for key, value in (checkpoint or {}).items():
        setattr(config.checkpoint, key, value)
    config.validation.interval_steps = 3
    recorder = Recorder(folder)
    task = CountingTask()
    trainer = Trainer(
        config=config,
        world=world,
        engine=CountingEngine(bad_steps=set(bad_steps)),  # type: ignore[arg-type]
        task=task,  # type: ignore[arg-type]
        saver=Saver(
            LocalStore(folder),
            world=world,
            config=config.checkpoint,
            origin=ORIGIN,
        ),
        recorder=recorder,  # type: ignore[arg-type]
        stop=Wish(recorder, at_step=stop_at),  # type: ignore[arg-type]
    )
    return trainer, recorder, recorder.scored


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """A real process group of one: the control word is a real collective."""
    import torch.distributed as dist

    from anemoi_dist.distributed.world import World

    if dist.is_initialized():
        dist.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.setenv(name, "0")
            patch.delenv(name)
        joined = World.join()
        yield joined
        joined.leave()


def batches() -> Iterator[list]:
    return iter(itertools.repeat([]))


def test_validates_and_saves_at_intervals_and_at_the_end(world, tmp_path: Path) -> None:
    trainer, recorder, scored = make(world, tmp_path)
    trainer.fit(batches())
    assert recorder.steps == list(range(1, 11))
    assert [step for name, step in recorder.events if name == "checkpoint"] == [4, 8, 10]
    assert scored == [("validation", 3), ("validation", 6), ("validation", 9), ("validation", 10), ("test", 10)]
    assert LocalStore(tmp_path).steps() == [10, 8, 4]
    assert trainer.stop.cleared


def test_the_task_is_told_what_was_saved_and_shows_what_it_says(world, tmp_path: Path, monkeypatch) -> None:
    fail_at({4}, monkeypatch)
    trainer, recorder, _ = make(world, tmp_path, checkpoint={"keep_last": 1})
    trainer.fit(batches())
    assert trainer.task.after_saves == [(8, [8]), (10, [10])]
    assert recorder.messages[1:] == ["beside 8", "beside 10"]


def test_resumes_where_it_was_saved_with_the_same_random_draws(world, tmp_path: Path) -> None:
    straight, _, _ = make(world, tmp_path)
    straight.fit(batches())
    again, recorder, _ = make(world, tmp_path)
    again.resume(Checkpoint(tmp_path / "step-00000004"))
    again.fit(batches())
    assert recorder.steps == list(range(5, 11))
    assert again.engine.draws == straight.engine.draws[4:]


@pytest.mark.parametrize("is_old", [False, True])
def test_samples_are_counted_on_when_the_global_batch_changes(world, tmp_path: Path, is_old: bool) -> None:
    trainer, *_ = make(world, tmp_path, global_batch_size=4)
    trainer.fit(batches())
    checkpoint = Checkpoint(tmp_path / "step-00000008")
    if is_old:  # 0.1.0 kept the number in the manifest alone
        saved = checkpoint.trainer()
        del saved["progress"]["samples_seen"]
        checkpoint.trainer = lambda: saved  # type: ignore[method-assign]
    (tmp_path / "again").mkdir()
    again, *_ = make(world, tmp_path / "again", global_batch_size=8)
    again.resume(checkpoint)
    assert again.progress.samples_seen == 8 * 4
    again.fit(batches())
    assert Checkpoint(tmp_path / "again" / "step-00000010").manifest.samples_seen == 8 * 4 + 2 * 8


def test_a_checkpoint_beyond_the_last_step_is_refused(world, tmp_path: Path) -> None:
    trainer, *_ = make(world, tmp_path)
    trainer.fit(batches())
    again, *_ = make(world, tmp_path)
    again.config.training.max_steps = 9
    with pytest.raises(ConfigError, match=r"training\.max_steps=9: the newest checkpoint is of step 10"):
        again.resume(Checkpoint(tmp_path / "step-00000010"))


def test_a_run_begins_where_another_program_has_left_off(world, tmp_path: Path) -> None:
    trainer, recorder, _ = make(world, tmp_path, global_batch_size=4)
    source = WholeTensors({("count", "param"): torch.tensor([6])})
    trainer.begin(Start(step=6, task={"num_evaluated": 3}), source)
    assert trainer.progress.samples_seen == 24 and trainer.task.num_evaluated == 3
    trainer.fit(batches())
    assert recorder.steps == [7, 8, 9, 10] and LocalStore(tmp_path).steps() == [10, 8]
    trainer, *_ = make(world, tmp_path)
    with pytest.raises(ConfigError, match=r"training\.max_steps=10: what the run begins with is of step 11"):
        trainer.begin(Start(step=11), source)


def test_a_stop_is_saved_one_step_after_the_wish(world, tmp_path: Path) -> None:
    trainer, recorder, scored = make(world, tmp_path, stop_at=5)
    with pytest.raises(StopRequestedError) as raised:
        trainer.fit(batches())
    assert raised.value.step == 6 and raised.value.reason == "SIGTERM" and raised.value.exit_code == 75
    assert ("stop_requested", 6) in recorder.events and recorder.events[-1] == ("checkpoint", 6)
    assert LocalStore(tmp_path).steps()[0] == 6 and trainer.stop.cleared
    assert ("test", 6) not in scored


def test_the_clock_asks_for_a_save_once_until_there_was_one() -> None:
    now = [0.0]
    clock = SaveClock(2.0, clock=lambda: now[0])
    now[0] = 119.0
    assert not clock.is_due()
    now[0] = 120.0
    assert [clock.is_due(), clock.is_due()] == [True, False]
    clock.restart()
    now[0] = 240.0
    assert clock.is_due() and not SaveClock(None).is_due()


def test_minutes_save_a_step_after_rank_0_has_asked(world, tmp_path: Path) -> None:
    trainer, recorder, _ = make(world, tmp_path)
    trainer.config.checkpoint.interval_steps = None
    trainer._clock = SaveClock(1.0, clock=lambda: 60.0 if len(recorder.steps) == 5 else 0.0)
    trainer.fit(batches())
    assert [step for name, step in recorder.events if name == "checkpoint"] == [6, 10]


def test_the_best_by_its_score_is_kept(world, tmp_path: Path) -> None:
    rmse = {2: 0.9, 4: 0.3, 6: 0.8, 8: 0.7, 10: 0.6}
    checkpoint = {"interval_steps": 2, "keep_last": 1, "keep_best": "rmse"}
    trainer, _, _ = make(world, tmp_path, checkpoint=checkpoint)
    trainer.config.validation.interval_steps = 2

    trainer.task.evaluate = lambda split, **_: Evaluation(summary={"rmse": rmse[trainer.progress.step], "acc": 0.5})
    trainer.fit(batches())
    assert LocalStore(tmp_path).steps() == [10, 4]
    assert Checkpoint(tmp_path / "step-00000004").trainer()["scores"] == {"rmse": 0.3, "acc": 0.5}


def fail_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    commit = saver_module.commit

    def failing(*args: Any, **kwargs: Any) -> str:
        if kwargs["step"] in steps:
            raise OSError(28, "No space left on device")
        return commit(*args, **kwargs)

    monkeypatch.setattr(saver_module, "commit", failing)


def test_a_save_that_fails_is_told_and_training_goes_on(world, tmp_path: Path, monkeypatch) -> None:
    fail_at({4}, monkeypatch)
    trainer, recorder, _ = make(world, tmp_path)
    trainer.fit(batches())
    assert [event for event in recorder.events if event[0] != "validation"] == [
        ("save_failed", 4),
        ("checkpoint", 8),
        ("checkpoint", 10),
    ]
    assert "No space left" in recorder.messages[0] and LocalStore(tmp_path).steps() == [10, 8]


def test_or_ends_the_run(world, tmp_path: Path, monkeypatch) -> None:
    fail_at({4}, monkeypatch)
    trainer, recorder, _ = make(world, tmp_path, checkpoint={"on_error": "stop"})
    with pytest.raises(CheckpointError, match=r"step 4 was not saved.*No space left"):
        trainer.fit(batches())
    assert recorder.steps[-1] < 10


@pytest.mark.parametrize("stop_at", [None, 5])
def test_a_last_save_that_fails_is_no_good_end(world, tmp_path: Path, monkeypatch, stop_at: int | None) -> None:
    fail_at({10, 6}, monkeypatch)
    trainer, _, _ = make(world, tmp_path, stop_at=stop_at)
    with pytest.raises(CheckpointError, match="the last, was not saved"):
        trainer.fit(batches())
    assert LocalStore(tmp_path).steps() == ([8, 4] if stop_at is None else [4])
    assert not trainer.stop.cleared


def test_too_many_skipped_in_a_row_is_divergence_and_the_count_survives_a_resume(world, tmp_path: Path) -> None:
    trainer, _recorder, _ = make(world, tmp_path, bad_steps={3, 4, 5})
    with pytest.raises(DivergedError) as raised:
        trainer.fit(batches())
    assert (raised.value.num_skipped, raised.value.step) == (3, 5) and raised.value.exit_code == 5
    resumed, _, _ = make(world, tmp_path, bad_steps={5})
    resumed.resume(Checkpoint(tmp_path / "step-00000004"))
    with pytest.raises(DivergedError) as raised:
        resumed.fit(batches())
    assert raised.value.num_skipped == 3


def test_skipped_updates_that_are_not_in_a_row_are_borne(world, tmp_path: Path) -> None:
    trainer, recorder, _ = make(world, tmp_path, bad_steps={1, 2, 4, 5, 7, 8})
    trainer.fit(batches())
    assert recorder.steps[-1] == 10


def test_what_the_task_remembers_is_saved_and_given_back(world, tmp_path: Path) -> None:
    trainer, _, _ = make(world, tmp_path, stop_at=5)
    with pytest.raises(StopRequestedError):
        trainer.fit(batches())
    num_evaluated = trainer.task.num_evaluated
    assert num_evaluated > 0
    again, _, _ = make(world, tmp_path)
    checkpoint = Checkpoint(LocalStore(tmp_path).path(trainer.progress.step))
    again.resume(checkpoint)
    checkpoint.close()
    assert again.task.num_evaluated == num_evaluated


def test_ranks_that_share_a_model_draw_the_same_noise_in_a_validation(world, tmp_path: Path) -> None:
    trainer, _, _ = make(world, tmp_path)
    trainer._seed_rank = 5  # the group's, whatever this rank's own number
    trainer._validate("validation")
    seed_step(trainer.config.run.seed, step=0, rank=5)
    assert trainer.task.draw == torch.rand(()).item()
