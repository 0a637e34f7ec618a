from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anemoi_dist import __version__
from anemoi_dist.config.compose import compose
from anemoi_dist.config.overrides import available_groups
from anemoi_dist.engines.memory_estimate import ModelSize, Parameter
from anemoi_dist.errors import DivergedError, ExitCode
from anemoi_dist.launch import cli
from anemoi_dist.launch.commands import plan, report, train
from anemoi_dist.launch.launchers import local


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("anemoi-dist"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


# Start-up


#: What takes longest to import, as far as no command needs it to start.
HEAVY = {"torch", "numpy", "anemoi.datasets", "deepspeed", "matplotlib", "fsspec"}
CONFIGURING = {"hydra", "omegaconf", "yaml"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY | CONFIGURING),
        (["train", "--help"], HEAVY | CONFIGURING),
        (["--version"], HEAVY | CONFIGURING),
        (["plan", "--help"], HEAVY | CONFIGURING),
        (["config"], HEAVY),
        (["train", "--dry-run"], HEAVY),
    ],
)
def test_what_is_slow_to_import_is_not_imported(arguments, heavy):
    code = (
        "import sys\nfrom anemoi_dist.launch.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "assert code == 0, code\n"
        f"found = {heavy!r} & set(sys.modules)\nassert not found, found\n"
    )
    if "--dry-run" in arguments:  # without the process that builds the model
        code = (
            "from anemoi_dist.launch.launchers import model_size\n"
            "def unknown(config):\n    raise model_size.UnknownSizeError('not here')\n"
            f"model_size.model_size = unknown\n{code}"
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "composing the configuration\n"),
        (["resume", "r"], "inspecting the run\n"),
        (["train", "--dry-run"], ""),
        (["config"], ""),
        (["plan", "--json"], ""),
    ],
)
def test_the_first_line_comes_before_the_imports(arguments, line, monkeypatch, capsys):
    def interrupt(*names: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    assert cli.main(arguments) == ExitCode.INTERRUPTED
    assert capsys.readouterr().out == line


def test_help_lists_groups_and_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for group, options in available_groups().items():
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{group}="))
        assert line.split("=", 1)[1].replace("|", " ").split() == list(options)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"anemoi-dist {__version__}\n"


# Errors


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train", "--dryrun"],
        ["train", "training.max_stepss=3"],
        ["train", "engine=zero9", "--dry-run"],
        ["train", "training.global_batch_size=7", "launcher.ranks=2"],
        ["train", "--config", "nope.yaml"],
        ["train", "--config-dir", "nope"],
        ["config", "training.lr.rate"],
        ["report", "nope"],
        ["report", "../nope"],
        ["report", "a b"],
    ],
)
def test_a_users_mistake_is_one_message_and_code_2(arguments, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == ExitCode.CONFIGURATION
    composes = arguments[:1] == ["train"] and "--dry-run" not in arguments and "usage:" not in err
    assert out == ("composing the configuration\n" if composes else "")
    assert "anemoi-dist: " in err
    assert not Path("runs").exists()


def test_the_program_ends_with_the_code_and_without_a_traceback():
    done = command("train", "training.max_stepss=3")
    assert done.returncode == ExitCode.CONFIGURATION
    assert "training.max_steps" in done.stderr and "Traceback" not in done.stderr


def test_other_errors_keep_their_code(monkeypatch, capsys):
    def diverge(options):
        raise DivergedError(11, 40)

    monkeypatch.setattr(train, "run", diverge)
    assert cli.main(["train"]) == 5
    assert capsys.readouterr().err.startswith("anemoi-dist: 11 updates in a row")

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupt)
    assert cli.main(["train"]) == 130


# train and config


def test_overrides_may_stand_on_both_sides_of_an_option(tmp_path, capsys):
    (tmp_path / "o.yaml").write_text("training: {max_steps: 3}\n")
    assert cli.main(["config", "run.seed=4", "--config", "o.yaml", "engine=ddp", "~training.optimizer.alpha"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.run.seed, printed.training.max_steps, printed.engine.kind) == (4, 3, "ddp")
    assert "alpha" not in printed.training.optimizer


def test_dry_run_prints_the_plan_and_touches_nothing(monkeypatch, capsys):
    monkeypatch.setattr(plan, "model_size", lambda config: ModelSize([Parameter((10,))]))
    assert cli.main(["train", "--dry-run", "launcher.ranks=2", "run.id=x"]) == 0
    assert capsys.readouterr().out.endswith(f"-m anemoi_dist.train --run-directory {Path('runs/x').absolute()}\n")
    assert not Path("runs").exists()


def test_train_prepares_and_starts(monkeypatch, capsys):
    started = []

    def start(run, config, *, num_ranks):
        started.append((run.path, config.training.max_steps, num_ranks))
        return 75

    monkeypatch.setattr(local, "train", start)
    arguments = ["train", "run.id=x", "launcher.ranks=2"]
    assert cli.main([*arguments, "training.max_steps=5"]) == 75
    assert capsys.readouterr().err == ""
    assert cli.main([*arguments, "training.max_steps=6"]) == 75
    assert started == [(Path("runs/x").absolute(), 5, 2), (Path("runs/x").absolute(), 6, 2)]
    # The table of changes is rank 0's to show, under any way of starting it.
    assert capsys.readouterr().err == ""

    Path("runs/x/checkpoints/step-00000005").mkdir()
    assert cli.main([*arguments, "run.seed=1"]) == 2
    assert "run.allow_changed=[seed]" in capsys.readouterr().err
    assert len(started) == 2


def test_messages_of_a_translation_are_told(tmp_path, capsys):
    (tmp_path / "o.yaml").write_text("optimizer: {_target_: torch.optim.Adam}\n")
    assert cli.main(["config", "--config", "o.yaml"]) == 0
    assert "note: optimizer became training.optimizer" in capsys.readouterr().err


def test_output_into_a_pipe_that_closes():
    shell = f"{Path(sys.executable).with_name('anemoi-dist')} config | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert done.stdout == "run:\n"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# report


def test_report_takes_an_id_or_a_path(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(report, "write_report", lambda run: seen.append(run.path) or run.report_dir / "index.html")
    for name in ("runs/one", "elsewhere/two"):
        Path(name).mkdir(parents=True)
        Path(name, "config.yaml").touch()
    assert cli.main(["report", "one"]) == 0
    assert cli.main(["report", "two", "--root", "elsewhere"]) == 0
    assert cli.main(["report", "elsewhere/two"]) == 0
    here = Path.cwd()
    assert seen == [here / "runs/one", here / "elsewhere/two", here / "elsewhere/two"]
    assert capsys.readouterr().out.splitlines()[0].endswith("runs/one/report/index.html")
    assert cli.main(["report", "onne"]) == 2
    assert "nearest: one" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--strict", "run.id=x"], ["run.id=x", "--strict"]])
def test_strict_is_short_for_the_key(arguments, monkeypatch):
    composed = []
    record = lambda overrides, **files: composed.append(overrides) or compose(overrides)  # noqa: E731
    monkeypatch.setattr("anemoi_dist.config.compose.compose", record)
    monkeypatch.setattr(train, "show_plan", lambda config: "")
    assert cli.main(["train", "--dry-run", *arguments]) == 0
    assert composed == [["run.id=x", "checkpoint.strict=true"]]
