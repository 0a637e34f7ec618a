"""A configuration of anemoi-training as a layer of ours: what is read, told, refused and frozen."""

import copy
import functools
import subprocess
import sys

import pytest
import yaml
from support.anemoi_configs import NEEDS, PLACES, packaged_configs

from anemoi_dist.config.anemoi import composition, facts
from anemoi_dist.config.anemoi.facts import Facts
from anemoi_dist.config.compose import compose
from anemoi_dist.config.overrides import parse_overrides
from anemoi_dist.config.parse import from_yaml, to_yaml
from anemoi_dist.config.tree import find
from anemoi_dist.errors import ConfigError
from anemoi_dist.launch.commands.sweep import expand
from anemoi_dist.run.prepare import prepare_run

composed_by_hydra = composition._composed_by_hydra
CONFIGS = packaged_configs()
TASK = ("task=anemoi", f"task.config={CONFIGS}", "training.precision=fp32")


@functools.cache
def hydra_once(directory, name, overrides):
    return composed_by_hydra(directory, name, list(overrides))


@pytest.fixture(autouse=True)
def described(monkeypatch):
    """Stand in for the process that opens the datasets; the settings it was given are kept."""
    given = []
    # Hydra takes most of the time, and most tests compose the same.
    cached = lambda directory, name, overrides: copy.deepcopy(hydra_once(directory, name, tuple(overrides)))  # noqa: E731
    monkeypatch.setattr(composition, "_composed_by_hydra", cached)
    monkeypatch.setattr(facts, "describe", lambda settings, **_: given.append(settings) or Facts(84, 16))
    return given


def build(*arguments, overrides=(), name="config", **more):
    theirs = ",".join([*PLACES, *NEEDS.get(name, ()), *overrides])
    return compose([*TASK, f"task.name={name}", f"task.overrides=[{theirs}]", *arguments], **more)


@pytest.mark.parametrize("name", NEEDS)
def test_packaged_configurations(name, described):
    composed = build(name=name)
    config = composed.config
    assert config.task.settings == described[0]
    assert config.model == {"_target_": config.task.settings["training"]["method"]["_target_"]}
    assert (config.data.kind, config.data.dataset) == ("anemoi", None)
    assert config.run.id.startswith(f"anemoi-{name[:16]}-zero2-")
    assert from_yaml(to_yaml(config)) == config
    assert not find(config.task.settings, "diagnostics.callbacks")[1]
    assert any(message.startswith("left out") and "diagnostics.plot" in message for message in composed.messages)


def test_every_rule_is_told_and_has_its_origin():
    composed = build("launcher.ranks=2")
    training = composed.config.training
    assert (training.global_batch_size, training.micro_batch_size) == (4, 2)
    assert (training.lr.rate, training.lr.scale_with) == (2 * 0.625e-4, "none")
    assert composed.config.task.steps_per_epoch == 84 // 4
    assert composed.config.run.seed == 42
    assert composed.provenance["training.lr.rate"] == "task.config (training.optimization.lr x 2)"
    assert composed.provenance["launcher.ranks"] == composed.provenance["training.precision"] == "command line"
    for key in composed.config.task.translated:
        assert any(f"{key}=" in message for message in composed.messages), key


def test_layers():
    """Ours over theirs, theirs over the groups."""
    assert build().config.telemetry.interval_steps == 100
    config = build("telemetry.interval_steps=7", "training.lr.rate=0.5", "data.num_workers=0").config
    assert (config.telemetry.interval_steps, config.training.lr.rate, config.data.num_workers) == (7, 0.5, 0)
    assert config.training.lr.warmup == 0  # not the group's


def test_a_composed_file(tmp_path):
    composed = build()
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(composed.config.task.settings))
    again = compose(["task=anemoi", f"task.config={file}", "training.precision=fp32"])
    assert again.config.task.settings == composed.config.task.settings
    assert again.config.run.id.startswith("anemoi-mine-")
    edits = ["model.num_channels=8", "~training.scalers.datasets.data.pressure_level", "+data.resolution=o96"]
    edited = compose(["task=anemoi", f"task.config={file}", "training.precision=fp32", "task.overrides", *edits])
    settings = edited.config.task.settings
    assert settings["model"]["num_channels"] == 8
    assert settings["data"]["resolution"] == "o96"
    assert "pressure_level" not in settings["training"]["scalers"]["datasets"]["data"]
    for text, part in [
        ("model=gnn", "directory"),
        ("model.num_chanels=8", "num_channels"),
        ("+model.num_channels=8", "exists"),
    ]:
        with pytest.raises(ConfigError, match=part):
            compose(["task=anemoi", f"task.config={file}", "task.overrides", text])


def test_a_directory_of_the_user(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "mine.yaml").write_text((CONFIGS / "config.yaml").read_text())
    text = (CONFIGS / "training" / "single.yaml").read_text()
    (tmp_path / "training" / "single.yaml").write_text(text.replace("max_steps: 150000", "max_steps: 77"))
    arguments = [*TASK[:1], TASK[2], f"task.overrides=[{','.join(PLACES)},model=graphtransformer]"]
    by_directory = compose([*arguments, f"task.config={tmp_path}", "task.name=mine"])
    by_file = compose([*arguments, f"task.config={tmp_path / 'mine.yaml'}"])
    for composed in (by_directory, by_file):
        assert composed.config.training.max_steps == 77
        processor = composed.config.task.settings["model"]["processor"]["_target_"]
        assert processor.endswith(".GraphTransformerProcessor")
    assert by_directory.config.task.settings == by_file.config.task.settings
    # The way to a configuration is not what is computed.
    assert by_directory.config.run.id == by_file.config.run.id


def test_a_run_goes_on_with_what_was_composed(tmp_path, monkeypatch):
    """On other ranks, with more data: the batch, the rate and the epoch stay."""
    named = ("run.id=one", f"run.root={tmp_path}")
    first = build("launcher.ranks=2", *named)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text(to_yaml(first.config))
    monkeypatch.setattr(facts, "describe", lambda settings, **_: pytest.fail("the data are read again"))
    again = build("launcher.ranks=4", *named)
    assert any("not composed again" in message for message in again.messages)
    assert again.config.task == first.config.task
    assert again.config.training.lr == first.config.training.lr
    assert (again.config.training.global_batch_size, again.config.training.micro_batch_size) == (4, None)
    same = build("launcher.ranks=2", *named)
    assert same.config == first.config
    monkeypatch.setattr(facts, "describe", lambda settings, **_: Facts(84, 16))
    other = build("launcher.ranks=2", *named, overrides=["model.num_channels=8"])
    assert other.config.task.settings["model"]["num_channels"] == 8


def test_a_run_is_guarded_by_what_was_composed(tmp_path):
    """Not by the way to it: a moved directory is the same run, another model is not."""
    config = build(f"run.root={tmp_path}", "run.id=one").config
    config.task.settings["data"]["note"] = "a ${not.a.key}"
    run = prepare_run(config)
    (run.checkpoints_dir / "step-00000001").mkdir(parents=True)
    config.task.config = "/moved"
    prepare_run(config)
    assert {change.key for change in run.read_state().changes} == {"task.config"}
    config.task.settings["model"]["num_channels"] = 8
    with pytest.raises(ConfigError, match=r"allow_changed=\[task\]"):
        prepare_run(config)


def test_a_frozen_file_is_whole(tmp_path):
    first = build()
    (tmp_path / "config.yaml").write_text(to_yaml(first.config))
    assert compose([], config_file=tmp_path / "config.yaml").config == first.config


def test_what_stays_literal(tmp_path):
    kept = "a ${not.a.key} \\\\${b}"
    theirs = ["+data.datasets.data.note='a \\${not.a.key}'", "model.num_channels=${oc.decode:'16'}"]
    composed = build(overrides=theirs)
    assert composed.config.task.settings["data"]["datasets"]["data"]["note"] == "a ${not.a.key}"
    assert composed.config.task.settings["model"]["num_channels"] == 16
    assert from_yaml(to_yaml(composed.config)) == composed.config
    (tmp_path / "config.yaml").write_text(to_yaml(composed.config))
    assert compose([], config_file=tmp_path / "config.yaml").config == composed.config
    composed.config.task.settings["data"]["note"] = kept
    assert from_yaml(to_yaml(composed.config)) == composed.config


@pytest.mark.parametrize(
    ("arguments", "key", "part"),
    [
        (["data=synthetic"], "data", "task.overrides"),
        (["model=latlon"], "model", "task.overrides"),
        (["training/optimizer=ademamix"], "training/optimizer", "training.KEY"),
        (["data.dataset=/x.zarr"], "data.dataset", "dataloader"),
        (["+model.width=3"], "model.width", "task.overrides"),
        (["training.rollout=2"], "training.rollout", "task.rollout"),
        (["validation.lead_steps=[1]"], "validation.lead_steps", "validation_rollout"),
        (["task.steps_per_epoch=3"], "task.steps_per_epoch", "limit_batches"),
    ],
)
def test_keys_of_ours_without_effect_are_refused(arguments, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        build(*arguments)
    assert caught.value.key == key


def test_keys_of_the_task_need_the_task():
    with pytest.raises(ConfigError, match="task=anemoi") as caught:
        compose([f"task.config={CONFIGS}"])
    assert caught.value.key == "task.config"


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["system.input.dataset=???"], "system.input.dataset", "mandatory"),
        (["model.nosuch=1"], "task.overrides", "nosuch"),
        (["model=nosuch"], "task.overrides", "nosuch"),
        (["system/hardware=slurm"], "system.hardware.num_nodes", "launcher.nodes=N"),
        (["model.num_channels=${nosuch.key}"], "model.num_channels", "nosuch"),
        (["dataloader.dataset='https://me:word@x.org/d'"], "dataloader.dataset", "password"),
    ],
)
def test_what_cannot_be_composed(overrides, key, part, monkeypatch):
    for name in ("SLURM_NNODES", "SLURM_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=part) as caught:
        build(overrides=overrides)
    assert caught.value.key == key
    assert "word" not in str(caught.value).replace("password", "")


def test_the_launchers_numbers_stand_for_a_job_of_theirs():
    config = build("launcher=slurm", "launcher.nodes=2", "launcher.ranks=4", overrides=["system/hardware=slurm"]).config
    assert config.training.global_batch_size == 2 * 8
    assert config.task.settings["system"]["hardware"]["num_gpus_per_node"] == 4


def test_no_torch_and_no_import_of_theirs():
    code = (
        "import sys; from anemoi_dist.config.anemoi import facts; facts.describe = lambda s, **_: facts.Facts(84, 16);"
        "from anemoi_dist.config.compose import compose;"
        f"compose([*{TASK!r}, 'task.overrides=[{','.join(PLACES)}]']);"
        "print([n for n in ('torch', 'anemoi.models', 'anemoi.training.train') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["task.overrides=[a=1,b=[1,2],~c]"], ["a=1", "b=[1,2]", "~c"]),
        (["task.overrides=['a=1',\"b={x: 1, y: 2}\"]"], ["a=1", "b={x: 1, y: 2}"]),
        (["task.overrides=[a='x,y']", "task.overrides", "b=1,2", "+c=${x}"], ["a='x,y'", "b=1,2", "+c=${x}"]),
        (["task.overrides=[]"], []),
        (["engine=ddp", "task.overrides"], []),
    ],
)
def test_overrides_of_theirs(arguments, expected):
    parsed = parse_overrides(arguments, groups={"engine": ("ddp",)})
    assert [item for edit in parsed.edits for item in edit.value] == expected


def test_theirs_are_swept_too():
    runs = expand(["training.lr.rate=1,2", "task.overrides=[a=1,b=2]", "task.overrides", "model.num_channels=8,16"])
    assert len(runs) == 4
    assert runs[0] == ["training.lr.rate=1", "task.overrides=[a=1,b=2]", "task.overrides", "model.num_channels=8"]


@pytest.mark.parametrize("how", ["file", "override"])
def test_a_search_path_imports_no_package(tmp_path, monkeypatch, how):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs").mkdir()
    own = "hydra: {searchpath: ['pkg://planted']}\n" if how == "file" else ""
    (tmp_path / "theirs" / "mine.yaml").write_text(f"defaults: [_self_]\n{own}data: {{}}\n")
    overrides = ["hydra.searchpath=[pkg://planted]"] if how == "override" else []
    with pytest.raises(ConfigError, match=r"hydra\.searchpath='pkg://planted': would be imported"):
        composed_by_hydra(tmp_path / "theirs", "mine", overrides)
    assert not (tmp_path / "ran").exists()


def test_a_search_path_of_directories_and_of_anemoi_training_is_theirs(tmp_path):
    (tmp_path / "more" / "data").mkdir(parents=True)
    (tmp_path / "more" / "data" / "own.yaml").write_text("own: 1\n")
    search = f"['file://{tmp_path / 'more'}', 'pkg://anemoi.training/config']"
    (tmp_path / "mine.yaml").write_text(f"defaults: [data: own, _self_]\nhydra: {{searchpath: {search}}}\n")
    assert composed_by_hydra(tmp_path, "mine", [])["data"] == {"own": 1}
