import math
import mmap

import pytest
import torch

from anemoi_dist.config.schema import Config, TelemetryConfig, TrainingConfig
from anemoi_dist.engines.base import StepReport
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.tasks.base import Evaluation
from anemoi_dist.training.recorder import Recorder, memory_bytes

SCORES = [{"forecast": "model", "variable": "msl", "lead_s": 21600, "rmse": 127.5, "acc": 0.98}]
EVALUATION = Evaluation(SCORES, "model 127.5 Pa", metrics={"rmse/msl/model/6h": 127.5})


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


def recorder_of(run, *, is_main=True, total_steps=25, first_step=0, **options):
    config = Config(telemetry=TelemetryConfig(**options), training=TrainingConfig(max_steps=total_steps))
    return Recorder(run, config, is_main=is_main, first_step=first_step)


def report(**changes):
    return StepReport(**{"loss": 0.5, "grad_norm": 2.0, "lr": 1e-3, "skipped": False, **changes})


def test_steps_are_recorded_every_interval_and_at_both_ends(run, capsys):
    recorder = recorder_of(run, interval_steps=10)
    for step in range(1, 26):
        recorder.step(step, report(), num_samples=8, schedule_values={"alpha": 2.0, "beta3": 0.999})
    recorder.close()
    events = read_events(run.events_file)
    assert [event["step"] for event in events] == [1, 10, 20, 25]
    last = events[-1]
    assert {key: last[key] for key in ("event", "loss", "lr", "grad_norm", "alpha", "beta3")} == {
        "event": "step", "loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "alpha": 2.0, "beta3": 0.999,
    }  # fmt: skip
    assert last["samples_per_s"] > 0
    assert last["eta_s"] == 0
    assert last["memory_bytes"] > 2**20
    assert events[0]["samples_per_s"] is None
    assert capsys.readouterr().out.count("step ") == 4


def test_a_skipped_update_is_an_event_at_any_step(run):
    recorder = recorder_of(run, interval_steps=10)
    recorder.step(3, report(loss=math.nan, grad_norm=math.inf, skipped=True), num_samples=8, schedule_values={})
    recorder.close()
    (event,) = read_events(run.events_file)
    assert (event["event"], event["step"], event["loss"], event["grad_norm"]) == ("skipped_update", 3, None, None)


def test_scores_are_recorded_and_their_table_is_shown(run, capsys):
    recorder = recorder_of(run)
    recorder.validation(20, "test", EVALUATION)
    recorder.message("a warning")
    recorder.event("end", step=25, state="finished", seconds=recorder.seconds())
    recorder.close()
    validation, end = read_events(run.events_file)
    assert (validation["event"], validation["split"], validation["scores"]) == ("validation", "test", SCORES)
    assert (end["event"], end["step"], end["state"]) == ("end", 25, "finished")
    assert capsys.readouterr().out == "test split after step 20:\nmodel 127.5 Pa\na warning\n"


def test_other_ranks_measure_phases_and_write_nothing(run, capsys):
    recorder = recorder_of(run, is_main=False, tensorboard=True)
    with recorder.phase("step"):
        recorder.step(10, report(skipped=True), num_samples=8, schedule_values={})
    recorder.event("start", step=0)
    recorder.validation(10, "test", EVALUATION)
    recorder.message("text")
    recorder.close()
    assert recorder.seconds()["step"] > 0
    assert not run.events_file.exists()
    assert list(run.metrics_dir.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_validation_time_is_not_in_the_speed(run):
    recorder = recorder_of(run, interval_steps=1)
    clock = {"now": 0.0}
    recorder._timer._clock = recorder._speed._clock = lambda: clock["now"]
    recorder._timer.seconds()
    for step in (1, 2, 3):
        with recorder.phase("step"):
            clock["now"] += 1
        recorder.step(step, report(), num_samples=8, schedule_values={})
        with recorder.phase("validation"):
            clock["now"] += 9
    recorder.close()
    last = read_events(run.events_file)[-1]
    assert last["samples_per_s"] == pytest.approx(8)
    assert last["eta_s"] == pytest.approx(22 * 10)


def test_tensorboard_gets_steps_and_scores(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = recorder_of(run, interval_steps=1, tensorboard=True)
    recorder.step(1, report(), num_samples=8, schedule_values={"alpha": 2.0})
    recorder.validation(1, "validation", EVALUATION)
    recorder.close()
    accumulator = EventAccumulator(str(run.metrics_dir))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"training/loss", "training/lr", "training/grad_norm", "training/alpha", "training/memory_bytes"} <= tags
    assert "validation/rmse/msl/model/6h" in tags
    assert "training/samples_per_s" not in tags  # not known after one step


def test_close_may_come_twice(run):
    recorder = recorder_of(run)
    recorder.close()
    recorder.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_memory_is_that_of_this_process():
    before = memory_bytes()
    with mmap.mmap(-1, 64 * 2**20) as held:  # memory of its own, not what the allocator has kept of other tests
        held[:: mmap.PAGESIZE] = bytes(len(held) // mmap.PAGESIZE)
        assert 48 * 2**20 < memory_bytes() - before < 80 * 2**20
