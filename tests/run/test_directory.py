from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.many_runs import read_state, write_state

from anemoi_dist.config.compose import compose
from anemoi_dist.config.identity import changes_table, check_run_id, config_changes, derive_run_id
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run import directory
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.events import EventLog
from anemoi_dist.run.prepare import prepare_run
from anemoi_dist.run.records import AttemptRecord, RunState


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Names and files


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64])
def test_names(name):
    assert check_run_id(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "é", "x" * 65, "../x", "a\0"])
def test_refused_names(name):
    with pytest.raises(ConfigError, match="names a directory"):
        check_run_id(name)


@settings(deadline=None)
@given(st.text())
def test_a_located_run_lies_directly_below_its_root(name):
    try:
        run = RunDirectory.locate("/root", name)
    except ConfigError:
        return
    assert run.path.parent == Path("/root")
    assert run.run_id == name


def test_every_path_is_below_the_run(tmp_path):
    run = RunDirectory.locate(tmp_path, "r")
    paths = [getattr(run, name) for name, item in vars(RunDirectory).items() if isinstance(item, property)]
    paths = [path for path in paths if isinstance(path, Path)]
    paths += [run.logs_dir(1), run.log_file(1, 2), run.heartbeat_file(3)]
    assert len({*paths}) == len(paths) > 10
    assert all(path.is_relative_to(run.path) for path in paths)
    assert run.log_file(1, 2).relative_to(run.path).as_posix() == "logs/attempt-01/rank-00002.log"


def test_directories_are_private(tmp_path):
    run = RunDirectory.locate(tmp_path / "new" / "root", "r")
    run.create()
    run.create()
    for folder in (run.path, run.checkpoints_dir, run.control_dir):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_state_round_trip(tmp_path):
    run = RunDirectory.locate(tmp_path, "r")
    assert run.read_state() == RunState("planned", attempts=[])
    run.create()
    run.write_state(RunState("running", attempts=[AttemptRecord(1)]))
    assert run.read_state().attempts == [AttemptRecord(1)]
    with pytest.raises(ValueError, match="resting"):
        run.write_state(RunState("resting"))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    target = tmp_path / "f"
    write_atomically(target, "old")

    def fail(source, destination):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


# Identity


def test_the_same_command_is_the_same_run():
    first, second = compose(["engine=zero1"]), compose(["engine=zero1"])
    assert first.config.run.id == second.config.run.id
    assert first.config.run.id.startswith("era5_sample-latlon-zero1-")
    check_run_id(first.config.run.id)


@pytest.mark.parametrize(
    "override", ["run.root=/elsewhere", "launcher.ranks=4", "telemetry.interval_steps=1", "run.allow_changed=[data]"]
)
def test_where_it_runs_and_what_it_logs_is_not_identity(override):
    assert compose([override]).config.run.id == compose([]).config.run.id


@pytest.mark.parametrize(
    "override", ["run.seed=1", "training.max_steps=11", "+model.other=1", "checkpoint.interval_steps=7"]
)
def test_what_it_computes_is_identity(override):
    assert compose([override]).config.run.id != compose([]).config.run.id


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["data", "model", "engine"]), st.text(), min_size=3))
def test_any_choice_gives_a_valid_name(choices):
    config = _CONFIG
    check_run_id(derive_run_id(config, choices=choices))


_CONFIG = compose([]).config


# Preparing


def prepare(*overrides: str):
    composed = compose(["run.id=r", *overrides])
    return composed, prepare_run(composed.config)


def test_a_new_run_is_frozen():
    composed, run = prepare("engine=fsdp2")
    assert run.path == Path("runs/r").absolute()
    assert from_yaml(run.config_file.read_text()) == composed.config
    assert run.read_state() == RunState("planned", attempts=[])


def test_the_same_again_writes_nothing():
    _, run = prepare()
    before = run.config_file.stat().st_mtime_ns
    prepare("run.root=" + str(run.path.parent))
    assert run.config_file.stat().st_mtime_ns == before
    assert not run.state_file.exists()


def test_what_differs_is_left_for_the_trainer():
    prepare()
    composed, run = prepare("training.lr.rate=0.5", "~training.optimizer.alpha", "data.num_workers=3")
    assert from_yaml(run.config_file.read_text()) == composed.config
    assert read_state(run)["changes"] == [
        {"key": "training.lr.rate", "was": 0.006, "is": 0.5},
        {"key": "training.optimizer.alpha", "was": 5.0, "is": None},
        {"key": "data.num_workers", "was": 1, "is": 3},
    ]
    prepare("training.lr.rate=0.5", "~training.optimizer.alpha", "data.num_workers=3")
    assert read_state(run)["changes"] == []


def test_other_entries_of_the_state_stay():
    _, run = prepare()
    attempt = {"attempt": 1, "started": 5.5, "changes": [], "job_id": None, "of a newer version": [1]}
    write_state(run, {"state": "preempted", "attempts": [attempt], "owner": None})
    prepare("training.max_steps=500")
    state = read_state(run)
    assert (state["state"], state["attempts"]) == ("preempted", [attempt])


@pytest.mark.parametrize(
    ("override", "name"),
    [("model._target_=other.Model", "model"), ("data.train.end=2025-12-20", "data"), ("run.seed=3", "seed")],
)
def test_what_would_break_a_run_is_refused_unless_named(override, name):
    _, run = prepare()
    (run.checkpoints_dir / "step-00000001").mkdir()
    frozen = run.config_file.read_text()
    with pytest.raises(ConfigError) as caught:
        prepare(override)
    assert f"run.allow_changed=[{name}]" in str(caught.value)
    assert override.split("=")[0] in str(caught.value)
    assert run.config_file.read_text() == frozen

    others = ",".join({"model", "data", "seed"} - {name})
    with pytest.raises(ConfigError):
        prepare(override, f"run.allow_changed=[{others}]")
    composed, run = prepare(override, f"run.allow_changed=[{name}]")
    assert from_yaml(run.config_file.read_text()) == composed.config


def test_ranks_may_share_a_model_in_another_way_than_before():
    config = compose(["run.id=r"]).config
    config.task.settings = {"system": {"hardware": {"num_gpus_per_model": 2, "num_gpus_per_ensemble": 4}}}
    run = prepare_run(config)
    (run.checkpoints_dir / "step-00000001").mkdir()
    config.task.settings["system"]["hardware"]["num_gpus_per_model"] = 1
    assert from_yaml(prepare_run(config).config_file.read_text()) == config
    config.task.settings["system"]["hardware"]["num_gpus_per_ensemble"] = 2  # has another number of members
    with pytest.raises(ConfigError, match=r"run.allow_changed=\[task\]"):
        prepare_run(config)


def test_a_run_that_has_done_nothing_takes_another_model_data_and_seed():
    _, run = prepare("run.seed=1")
    log = EventLog(run.events_file)
    log.write("start", step=0)
    composed, run = prepare("model._target_=other.Model", "data.train.end=2025-12-20", "run.seed=2")
    assert from_yaml(run.config_file.read_text()) == composed.config

    log.write("step", step=1)
    log.close()
    with pytest.raises(ConfigError, match=r"run.allow_changed=\[model\]"):
        prepare("run.seed=2", "data.train.end=2025-12-20")


def test_what_an_object_store_holds_is_not_risked():
    prepare("checkpoint.url=memory://there")
    with pytest.raises(ConfigError, match=r"run.allow_changed=\[seed\]"):
        prepare("run.seed=2")


def test_a_running_run_is_left_alone():
    _, run = prepare()
    frozen = run.config_file.read_text()
    with run.launch_lock_file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PreflightError, match="held by"):
            prepare("training.max_steps=3")
    assert run.config_file.read_text() == frozen
    prepare("training.max_steps=3")


def test_a_damaged_frozen_file_is_named():
    _, run = prepare()
    run.config_file.write_text("a: [")
    with pytest.raises(ConfigError) as caught:
        prepare()
    assert str(run.config_file) in str(caught.value)
    assert "take another run.id" in str(caught.value)


def test_a_frozen_file_of_another_version_still_compares():
    _, run = prepare()
    run.config_file.write_text(run.config_file.read_text() + "former: {option: 1}\n")
    prepare()
    assert read_state(run)["changes"] == [{"key": "former.option", "was": 1, "is": None}]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot prepare the run directory"):
        prepare("run.root=file")


def test_changes_tell_types_apart():
    changes = config_changes({"a": {"b": 1, "c": None}}, {"a": {"b": "1", "d": []}})
    assert [change.key for change in changes] == ["a.b", "a.d"]
    assert changes_table(changes).splitlines() == ["  key  was   is", "  a.b  1     1", "  a.d  None  []"]


def test_the_frozen_file_is_plain_yaml():
    composed, run = prepare("telemetry.interval_steps=3")
    text = run.config_file.read_text()
    assert "${" not in text
    assert json.loads(json.dumps(dataclasses.asdict(composed.config))) == dataclasses.asdict(from_yaml(text))


@pytest.mark.parametrize("text", ["{", "[]", '{"state": "running"}', '{"state": "odd", "attempts": []}'])
def test_a_damaged_state_file_is_named(tmp_path, text):
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    run.state_file.write_text(text)
    with pytest.raises(PreflightError, match=r"run\.json is damaged"):
        run.read_state()


def test_the_state_is_written_on_a_full_disk_into_the_space_that_is_reserved(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "r")
    run.create()
    run.reserve_space()
    assert run.reserve_file.stat().st_blocks * 512 >= 256 * 1024
    write = directory.write_atomically

    def on_full_disk(path, text):
        if run.reserve_file.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(directory, "write_atomically", on_full_disk)
    with run.changing_state() as state:
        state.state = "failed"
    assert run.read_state().state == "failed"
    assert not run.reserve_file.exists()


def test_a_disk_that_fails_otherwise_does_not_cost_the_reserve(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "r")
    run.create()
    run.reserve_space()

    def fail(path, text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(directory, "write_atomically", fail)
    with pytest.raises(OSError, match="Input/output error"), run.changing_state() as state:
        state.state = "failed"
    assert run.reserve_file.exists()
