from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anemoi_dist.config.compose import compose
from anemoi_dist.config.overrides import available_groups
from anemoi_dist.config.parse import from_yaml, to_yaml
from anemoi_dist.config.provenance import annotated_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.config.tree import find, leaves
from anemoi_dist.errors import ConfigError

GROUPS = available_groups()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def value(composed, key: str):
    exists, found = find(composed.container(), key)
    assert exists, key
    return found


# Composition


def test_the_default_job():
    composed = compose([])
    assert isinstance(composed.config, Config)
    assert (composed.config.engine.kind, composed.config.engine.stage) == ("deepspeed", 2)
    assert composed.choices["engine"] == "zero2"
    assert composed.choices["training/optimizer"] == "ademamix"
    assert composed.messages == []


@pytest.mark.parametrize("index", range(max(len(options) for options in GROUPS.values())))
def test_every_option_of_every_group_composes_and_type_checks(index, monkeypatch):
    """Each job takes the next option of every group, or the last where there are no more."""
    chosen = {group: options[min(index, len(options) - 1)] for group, options in GROUPS.items()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///mlflow")  # of telemetry=mlflow
    chosen["task"] = "forecast"  # the other task has its own data, model and training: tests/config/anemoi
    mandatory = ["data.dataset=/x.zarr"] if chosen["data"] == "anemoi" else []
    composed = compose([*(f"{group}={option}" for group, option in chosen.items()), *mandatory])
    assert {group: composed.choices[group] for group in chosen} == chosen
    assert from_yaml(to_yaml(composed.config)) == composed.config
    for key, origin in composed.provenance.items():
        assert origin.startswith(("configs/", "default", "derived", "command line")), (key, origin)


@pytest.mark.parametrize(
    ("option", "kind", "stage", "offload"),
    [
        ("ddp", "ddp", 0, False),
        ("zero0", "deepspeed", 0, False),
        ("zero1", "deepspeed", 1, False),
        ("zero2", "deepspeed", 2, False),
        ("zero3", "deepspeed", 3, False),
        ("zero3_offload", "deepspeed", 3, True),
        ("fsdp2", "fsdp2", 0, False),
    ],
)
def test_engines(option, kind, stage, offload):
    engine = compose([f"engine={option}"]).config.engine
    assert (engine.kind, engine.stage, engine.offload) == (kind, stage, offload)


def test_no_scheduler_by_group_and_by_key():
    assert compose(["training/scheduler=none"]).config.training.scheduler is None
    assert compose(["training.scheduler=null"]).config.training.scheduler is None


def test_precedence(tmp_path):
    overlay = write(tmp_path / "mine.yaml", "training: {max_steps: 7, rollout: 2}\nengine: {options: {a: 1}}\n")
    composed = compose(["engine=zero1", "training.rollout=3"], config_file=overlay)
    assert composed.config.engine.stage == 1
    assert composed.config.engine.options == {"a": 1}
    assert composed.config.training.max_steps == 7
    assert composed.config.training.rollout == 3
    origins = composed.provenance
    assert origins["engine.stage"] == "configs/engine/zero1.yaml"
    assert origins["engine.options.a"] == origins["training.max_steps"] == str(overlay)
    assert origins["training.rollout"] == "command line"
    assert origins["training.lr.iterations"] == "default (anemoi_dist/config/schema.py)"
    assert origins["run.id"] == "derived"
    assert set(origins) == {key for key, _ in leaves(composed.container())}


def test_interpolation_sees_the_last_word():
    optimizer = compose(["training.max_steps=33"]).config.training.optimizer
    assert optimizer["alpha_warmup"] == 33


def test_users_groups(tmp_path):
    directory = tmp_path / "it's mine"
    write(directory / "data" / "mine.yaml", "kind: anemoi\ndataset: /x.zarr\n")
    write(
        directory / "experiment" / "big.yaml",
        "# @package _global_\ndefaults: [{override /engine: zero3}]\nrun: {seed: 5}\n",
    )
    composed = compose(["data=mine", "+experiment=big"], config_dir=directory)
    assert composed.config.data.dataset == "/x.zarr"
    assert (composed.config.engine.stage, composed.config.run.seed) == (3, 5)
    assert composed.provenance["data.dataset"] == str(directory / "data" / "mine.yaml")
    assert composed.provenance["run.seed"] == str(directory / "experiment" / "big.yaml")
    assert composed.provenance["engine.stage"] == "configs/engine/zero3.yaml"
    assert composed.config.run.id.startswith("mine-latlon-zero3-")


def test_users_group_files_are_checked(tmp_path):
    write(tmp_path / "a" / "data" / "era5_sample.yaml", "kind: anemoi\n")
    with pytest.raises(ConfigError, match="has the name of a built-in option"):
        compose([], config_dir=tmp_path / "a")
    write(tmp_path / "b" / "data" / "mine.yaml", "kind: [\n")
    with pytest.raises(ConfigError):
        compose(["data=mine"], config_dir=tmp_path / "b")
    write(tmp_path / "c" / "data" / "mine.yaml", "kind: anemoi\ndataset: x\ntrian: {start: 2000}\n")
    with pytest.raises(ConfigError, match=r"did you mean data\.train"):
        compose(["data=mine"], config_dir=tmp_path / "c")
    with pytest.raises(ConfigError, match="is not a directory"):
        compose([], config_dir=tmp_path / "nowhere")


# Keys on the command line


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("training.lr.rate=1e-2", "training.lr.rate", 1e-2),
        ("training.clip_grad_norm=null", "training.clip_grad_norm", None),
        ("validation.lead_steps=[1,3]", "validation.lead_steps", [1, 3]),
        ("validation.lead_steps.1=5", "validation.lead_steps", [1, 5, 4]),
        ("training.lr={rate: 0.5, warmup: 3}", "training.lr.warmup", 3),
        ("data.dataset='/with space, comma={x}'", "data.dataset", "/with space, comma={x}"),
        ("data.dataset={join:[a,b]}", "data.dataset", {"join": ["a", "b"]}),
        ("+data.options.select=[msl]", "data.options.select", ["msl"]),
        ("++data.options.frequency=6h", "data.options.frequency", "6h"),
        ("data.train.start=2025-12-03", "data.train.start", "2025-12-03"),
        ("+model.extra.deep=1", "model.extra.deep", 1),
        ("training.lr.iterations='${training.max_steps}'", "training.lr.iterations", 400),
        ("launcher.max_restarts=2", "launcher.max_restarts", 2),
        ("~training.lr.warmup", "training.lr.warmup", 0),
        ("run.root=../somewhere", "run.root", "../somewhere"),
    ],
)
def test_keys(override, key, expected):
    composed = compose(["training.max_steps=400", override])
    assert value(composed, key) == expected


def test_a_deleted_argument_is_gone():
    assert "alpha" not in compose(["~training.optimizer.alpha"]).config.training.optimizer


def test_another_target_takes_nothing_from_the_former():
    composed = compose(["training.optimizer={eps: 1e-6}", "training.optimizer._target_=torch.optim.Adam"])
    assert composed.config.training.optimizer == {"_target_": "torch.optim.Adam", "eps": 1e-6}
    assert "replaces" in composed.messages[0]
    assert compose(["engine.kind=ddp"]).config.engine.stage == 0


ERRORS = [
    ("training.max_stepss=3", ["training.max_stepss=3", "training.max_steps"]),
    ("max_steps=3", ["did you mean training.max_steps?"]),
    ("training.rate=1", ["did you mean training.lr.rate?"]),
    ("enigne=zero1", ["did you mean engine?"]),
    ("training/optimizr=adam", ["did you mean training/optimizer="]),
    ("engine=zero9", ["is not an option", "zero1", "fsdp2"]),
    ("engine=null", ["needs an option", "zero1"]),
    ("~model", ["needs an option", "latlon"]),
    ("training.optimizer=adamw", ["training/optimizer=adamw"]),
    ("training.max_steps=1e3", ["must be an integer", "training.max_steps=1000"]),
    ("training.max_steps=true", ["must be an integer"]),
    ("training.max_steps=2.5", ["2.5", "must be an integer"]),
    ("training.max_steps=???", ["is mandatory", "training.max_steps=1000"]),
    ("training.max_steps=null", ["must be an integer"]),
    ("training.max_steps=-1", ["at least 1"]),
    ("~training.max_steps", ["training.max_steps"]),
    ("~training.optimizer", ["training/optimizer=ademamix"]),
    ("data=anemoi", ["data.dataset", "is mandatory", "/path/to"]),
    ("training.lr.rate=nan", ["positive, finite"]),
    ("training.lr.rate=inf", ["positive, finite"]),
    ("training.lr.rate=-1", ["positive, finite"]),
    ("training.lr.min=1", ["between 0 and training.lr.rate"]),
    ("training.lr=3", ["must be a mapping", "rate, iterations, min, warmup"]),
    ("training.precision=fp16", ["fp32, bf16"]),
    ("training.micro_batch_size=[1]", ["an integer or null"]),
    ("data.forcing=abc", ["must be a list"]),
    ("data.kind=grib", ["anemoi, synthetic"]),
    ("launcher.kind=slum", ["valid: local"]),
    ("engine.offload=true", ["needs ZeRO stage 3", "zero3_offload"]),
    ("engine.stage=4", ["0, 1, 2, 3"]),
    ("run.allow_changed=[weights]", ["model, data, seed"]),
    ("run.id=../x", ["names a directory"]),
    ("run.id=''", ["names a directory"]),
    ("validation.lead_steps=[]", ["[1,2,4]"]),
    ("validation.lead_steps=1,2", ["sweep", "is a list"]),
    ("training.seed=range(1,3)", ["sweep"]),
    ("model._targe_=3", ["model._target_", "+model._targe_=3 adds it"]),
    ("model.something_else=3", ["the keys of model are _target_, ", "+model.something_else=3 adds it"]),
    ("+model._target_=x", ["exists already"]),
    ("~training.lr.ratee", ["training.lr.rate"]),
    ("~training.rollout=5", ["nothing was deleted"]),
    ("model={_target_: 3}", ["import path"]),
    ("model=null", ["needs an option"]),
    ("training.lr.min=${nope.x}", ["cannot be resolved", "nope.x"]),
    ("training.max_steps=${training.max_steps}", ["training.max_steps", "cannot be resolved"]),
    ("hydra.verbose=true", ["is not a configuration key"]),
    ("engine@x=zero1", ["not key=value"]),
    ("just_text", ["is not key=value"]),
    ("mine.yaml", ["--config mine.yaml"]),
    ("=3", ["is not key=value"]),
    ("a=[1", ["is not key=value"]),
    ("", ["is not key=value"]),
    ("--flag=1", ["is not key=value"]),
    ("training.lr..rate=1", ["is not"]),
]


@pytest.mark.parametrize(("override", "parts"), ERRORS, ids=[override for override, _ in ERRORS])
def test_one_clear_error(override, parts):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    message = str(caught.value)
    assert len(message.splitlines()) <= 4, message
    for part in parts:
        assert part in message, message


def test_a_group_is_chosen_once():
    with pytest.raises(ConfigError, match="already set to 'zero1'"):
        compose(["engine=zero1", "engine=zero2"])


# A user's file


def test_a_target_in_a_file_replaces_the_node(tmp_path):
    file = write(tmp_path / "o.yaml", "training:\n  optimizer: {_target_: torch.optim.Adam, betas: [0.9, 0.95]}\n")
    composed = compose(["+training.optimizer.eps=1e-6"], config_file=file)
    assert composed.config.training.optimizer == {"_target_": "torch.optim.Adam", "betas": [0.9, 0.95], "eps": 1e-6}


def test_without_a_target_it_merges(tmp_path):
    file = write(tmp_path / "o.yaml", "training:\n  optimizer: {alpha: 5.0}\n")
    optimizer = compose([], config_file=file).config.training.optimizer
    assert optimizer["alpha"] == 5.0
    assert optimizer["_target_"].endswith("AdEMAMix")


def test_a_frozen_configuration_is_whole(tmp_path):
    frozen = compose(["data=synthetic", "engine=ddp", "run.id=x"]).config
    assert frozen.data.options == {}, "the default dataset has some"
    assert compose([], config_file=write(tmp_path / "config.yaml", to_yaml(frozen))).config == frozen


def test_null_in_a_file_wins(tmp_path):
    file = write(tmp_path / "o.yaml", "training: {scheduler: null}\n")
    composed = compose([], config_file=file)
    assert composed.config.training.scheduler is None
    assert composed.provenance["training.scheduler"] == str(file)


@pytest.mark.parametrize(
    ("snippet", "expected"),
    [
        (
            "optimizer:\n  _target_: torch.optim.Adam\n  betas: [0.9, 0.95]\n  weight_decay: 0.1\n",
            {"_target_": "torch.optim.Adam", "betas": [0.9, 0.95], "weight_decay": 0.1},
        ),
        (
            "optimizer:\n  _target_: anemoi.training.optimizers.AdEMAMix.AdEMAMix\n  betas: [0.9, 0.999, 0.9999]\n"
            "  alpha: 2.0\n  weight_decay: 0.01\n  beta3_warmup: 1000\n  alpha_warmup: 1000\n",
            {
                "_target_": "anemoi.training.optimizers.AdEMAMix.AdEMAMix",
                "betas": [0.9, 0.999, 0.9999],
                "alpha": 2.0,
                "weight_decay": 0.01,
                "beta3_warmup": 1000,
                "alpha_warmup": 1000,
            },
        ),
    ],
)
def test_the_documentations_bare_snippets(tmp_path, snippet, expected):
    composed = compose([], config_file=write(tmp_path / "s.yaml", snippet))
    assert composed.config.training.optimizer == expected
    assert composed.messages == ["optimizer became training.optimizer"]


def test_the_newer_layout_is_translated(tmp_path):
    text = (
        "training:\n  optimization:\n    lr: 1.0e-3\n    optimizer: {_target_: torch.optim.AdamW, weight_decay: 0.05}\n"
        "    lr_scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 3}\n"
    )
    composed = compose([], config_file=write(tmp_path / "n.yaml", text))
    training = composed.config.training
    assert training.optimizer == {"_target_": "torch.optim.AdamW", "weight_decay": 0.05}
    assert training.scheduler == {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}
    assert (training.lr.rate, training.lr.scale_with) == (1e-3, "world_size")
    assert any("became training.optimizer" in message for message in composed.messages)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [{data: zarr}, {dataloader: native_grid}, {override hydra/x: y}]\n",
        "defaults: [data: zarr, _self_]\nconfig_validation: true\n",
        "hardware: {num_gpus_per_node: 4}\ntraining: {max_steps: 3}\n",
        "dataloader: {}\n",
    ],
)
def test_a_configuration_of_anemoi_training_is_a_task_of_its_own(tmp_path, text):
    file = write(tmp_path / "theirs.yaml", text)
    with pytest.raises(ConfigError, match=r"task=anemoi task\.config=") as caught:
        compose([], config_file=file)
    assert caught.value.key == "--config"


@pytest.mark.parametrize(
    ("text", "overrides", "part"),
    [
        ("training: {max_stepss: 3}", [], "training.max_steps"),
        ("trainning: {max_steps: 3}", [], "did you mean training?"),
        ("engine: zero1", [], "engine=zero1 on the command line"),
        ("defaults: [{engine: zero1}]", [], "engine=zero1 on the command line"),
        ("- 1", [], "must hold a mapping"),
        ("a: [", [], "is not valid YAML"),
        ("a: 1\na: 2", [], "is not valid YAML"),
        ("optimizer: {_target_: x}\ntraining: {optimizer: {_target_: y}}", [], "twice"),
        ("training: {optimizer: {_target_: torch.optim.Adam}}", ["training/optimizer=adamw"], "has no effect"),
        ("training: 3", [], "must be a mapping"),
    ],
)
def test_a_file_with_a_slip(tmp_path, text, overrides, part):
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_file=write(tmp_path / "slip.yaml", text))
    assert part in str(caught.value)


def test_no_such_file_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        compose([], config_file=tmp_path / "nope.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError):
        compose([], config_file=tmp_path / "binary.yaml")


def test_nothing_is_imported_or_executed(tmp_path):
    (tmp_path / "trap.py").write_text("from pathlib import Path\nPath('sprung').touch()\nclass Optimizer: ...\n")
    code = (
        "import sys; from anemoi_dist.config.compose import compose; "
        "compose(['model._target_=trap.Optimizer', 'training.optimizer._target_=trap.Optimizer']); "
        "assert 'trap' not in sys.modules and 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sprung").exists()


# What is printed


def test_annotated_yaml_is_yaml_and_says_where_from(tmp_path):
    composed = compose(["engine=zero1", "training.lr.rate=0.5", "run.id=x", "+model.text='a: b # c'"])
    text = annotated_yaml(composed.container(), composed.provenance)
    assert OmegaConf.to_container(OmegaConf.create(text)) == composed.container()
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["stage"].endswith("# engine/zero1.yaml")
    assert lines["rate"].endswith("# command line")
    columns = {line.rindex("  # ") for line in text.splitlines() if "  # " in line and len(line) < 100}
    assert len(columns) == 1

    again = compose([], config_file=write(tmp_path / "printed.yaml", text))
    assert again.config == composed.config


def test_config_dir_and_working_directory_do_not_matter(tmp_path, monkeypatch):
    here = compose([]).config
    monkeypatch.chdir(tmp_path)
    assert dataclasses.asdict(compose([]).config) == dataclasses.asdict(here)
