"""What is refused before anything is submitted; no scheduler needed."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from anemoi_dist.config.compose import compose
from anemoi_dist.errors import ExitCode
from anemoi_dist.launch import cli
from anemoi_dist.launch.commands import submit
from anemoi_dist.launch.commands.parser import split_command
from anemoi_dist.launch.launchers import model_size
from anemoi_dist.run.attempt import Attempt
from anemoi_dist.run.prepare import prepare_run


def main(*arguments: str) -> int:
    return cli.main(["submit", *arguments])


def test_a_machine_without_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **more: None if name == "sbatch" else which(name, **more))
    assert main("launcher=slurm", f"run.root={tmp_path}", "run.id=r") == 3
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_dry_run_prints_the_scripts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(f"run.root={tmp_path}", "--dry-run", "--multirun", "run.seed=1,2") == 0
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash") == printed.count("exec ") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["launcher=local"], "has no queue"),
        (["launcher=mpi"], "has no queue"),
        (["launcher.kind=local"], "has no queue"),
        (["launcher=slurm", "--srun"], "about the command after --"),
        (["launcher=slurm", "--"], "followed by no command"),
        (["launcher=slurm", "training.max_steps=3", "--", "true"], "has no effect on a command"),
        (["launcher=slurm", "engine=zero1", "--", "true"], "has no effect on a command"),
        (["launcher=slurm", "training.lr.rate=1e-4,3e-4"], "--multirun"),
        (["launcher=slurm", "launcher.slurm.setup=['if true; then']"], "bash cannot read"),
        (["launcher=slurm", "--after", "nothing"], "is not a run"),
        (["launcher=slurm", "--after", "a", "--after-any", "b"], "excludes --after-any"),
        (["launcher=slurm", "training.global_batch_size=3"], "multiple of the 2 ranks"),
        (["launcher=slurm", "run.root='a\\b'"], "backslash"),
    ],
)
def test_what_is_refused(arguments: list[str], match: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    root = [] if any("run.root" in argument for argument in arguments) else [f"run.root={tmp_path}"]
    assert main(*arguments[:place], *root, *arguments[place:]) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_does_not_start_what_is_submitted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "launcher=slurm", f"run.root={tmp_path}"]) == 2
    assert "anemoi-dist submit" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_launcher_is_slurm_where_none_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(f"run.root={tmp_path}", "launcher.time=01:00:00", "--dry-run", "--", "hostname", "-f") == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --time=01:00:00\n" in printed and printed.endswith(" -- hostname -f\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("launcher: {kind: local}\n")
    assert main(f"run.root={tmp_path}", "--dry-run", "--config", str(mine)) == 2
    assert "has no queue" in capsys.readouterr().err


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an sbatch first in PATH that keeps what it gets."""
    tools = tmp_path / "bin"
    tools.mkdir()
    sbatch = tools / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\ncat > {tools}/script\nenv > {tools}/environment\necho "hello" >&2\necho "42;mini"\n'
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tools


def test_the_environment_of_the_user_does_not_overrule_the_script(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("TIMELIMIT", "OUTPUT", "NO_REQUEUE", "OPEN_MODE", "PARTITION", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    arguments = [
        "launcher=slurm",
        "launcher.time=01:00:00",
        "launcher.slurm.partition=gpu",
        f"run.root={tmp_path}",
        "run.id=r",
    ]
    assert main(*arguments, "--no-check") == 0
    captured = capsys.readouterr()
    assert (
        f"run r: job 42, 1 node, {tmp_path}/r\nnext: anemoi-dist status r --follow --root {tmp_path}\n" in captured.out
    )
    assert "hello" in captured.err, "a site's own remarks are shown"
    lines = (recorded / "environment").read_text().splitlines()
    assert [line for line in lines if line.startswith("SBATCH_")] == ["SBATCH_ACCOUNT=x"], (
        "it says what the script does not"
    )
    script = (tmp_path / "r" / "scripts" / "slurm-42.sh").read_text()
    assert script == (recorded / "script").read_text()


def test_what_slurm_says_in_two_lines_is_two_sentences(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (recorded / "sbatch").write_text(
        '#!/bin/bash\necho "sbatch: error: No such account" >&2\necho "sbatch: error: Batch job failed" >&2\nexit 1\n'
    )
    assert main(f"run.root={tmp_path}", "run.id=r", "--no-check") == 3
    assert "SLURM refuses the job: No such account; Batch job failed\n" in capsys.readouterr().err


def test_the_example_of_the_help_is_of_the_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main("--help")
    help_text = capsys.readouterr().out
    assert "  anemoi-dist submit launcher.nodes=2" in help_text and "anemoi-dist train" not in help_text


def test_a_stop_that_nobody_answered_is_forgotten(recorded: Path, tmp_path: Path) -> None:
    stop = tmp_path / "r" / "control" / "stop"
    stop.parent.mkdir(parents=True)
    stop.touch()
    assert main("launcher=slurm", f"run.root={tmp_path}", "run.id=r", "--no-check") == 0
    assert not stop.exists()


@pytest.mark.usefixtures("measured_here")
def test_a_model_that_no_rank_could_build_takes_no_place_in_the_queue(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["launcher=slurm", f"run.root={tmp_path}", "run.id=r", "model.dilations=[0]"]
    assert main(*arguments) == 2
    assert "model.dilations=[0]: must hold numbers from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "r").exists() and not (recorded / "script").exists()
    assert main(*arguments, "--no-check") == 0
    assert (recorded / "script").exists()


@pytest.mark.usefixtures("measured_here")
def test_a_model_that_only_this_machine_cannot_build_is_submitted(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main("launcher=slurm", f"run.root={tmp_path}", "run.id=r", "data.dataset=/nowhere.zarr") == 0
    captured = capsys.readouterr()
    assert "job 42" in captured.out
    assert "note: the model could not be built here" in captured.err and "/nowhere.zarr" in captured.err


def test_a_finished_run_is_not_submitted_again(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = compose(["launcher=slurm", f"run.root={tmp_path}", "run.id=r", "training.max_steps=20"]).config
    run = prepare_run(config)
    Attempt(run, world_size=2, max_steps=20).end(ExitCode.FINISHED)
    (run.checkpoints_dir / "step-00000020").mkdir()
    arguments = ["launcher=slurm", f"run.root={tmp_path}", "run.id=r", "--no-check"]
    assert main(*arguments, "training.max_steps=20") == 0
    out = capsys.readouterr().out
    assert out.startswith("run r is finished (training.max_steps=20); `anemoi-dist resume r training.max_steps=")
    assert not (recorded / "script").exists()
    assert main(*arguments, "training.max_steps=20", "run.seed=7") == 2
    assert "differs from what run r was started with" in capsys.readouterr().err
    assert main(*arguments, "training.max_steps=21") == 0
    assert "job 42" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--after", "--after-any"])
def test_waiting_for_a_run_that_no_queue_has_seen(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str
) -> None:
    run = prepare_run(compose([f"run.root={tmp_path}", "run.id=first"]).config)
    arguments = [f"run.root={tmp_path}", "run.id=second", "--no-check", option, "first"]
    assert main(*arguments) == 3
    assert "  fix: `anemoi-dist submit run.id=first ...` first" in capsys.readouterr().err
    Attempt(run, world_size=1, max_steps=20).end(ExitCode.FINISHED)
    assert main(*arguments) == 0
    assert "job 42" in capsys.readouterr().out
    assert "dependency" not in (recorded / "script").read_text()


def test_models_of_a_sweep_are_built_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(model_size, "model_size", lambda config, timeout_s: built.append(config))
    chosen = [["run.seed=1"], ["run.seed=2"], ["run.seed=2", "model.dilations=[1]"]]
    configs = [compose(overrides).config for overrides in chosen]
    assert model_size.check_models(configs) == ""
    assert len(built) == 2
    assert "0 of 2 models took 0 s" in model_size.check_models(configs, timeout_s=0.0)


def test_anemoi_training_is_started_by_srun(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--", "anemoi-training", "train", "--config-name", "my config"]
    assert main("launcher.gpus_per_node=4", f"run.root={tmp_path}", "--dry-run", *words) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=4" in script
    assert script.endswith(" --srun -- anemoi-training train --config-name 'my config'\n")


def test_the_id_of_a_command_follows_from_it() -> None:
    name = submit._command_id(["/usr/bin/my prog.py", "a"])
    assert name.startswith("command-my-prog.py-") and name == submit._command_id(["/usr/bin/my prog.py", "a"])
    assert name != submit._command_id(["/usr/bin/my prog.py", "b"])
    assert submit._command_id(["$(x)"]).startswith("command-x-")
    assert submit._command_id(["/"]).startswith("command-")


def test_only_submit_takes_a_command() -> None:
    assert split_command(["submit", "a=b", "--", "x", "--", "y"]) == (["submit", "a=b"], ["x", "--", "y"])
    assert split_command(["train", "--", "x"]) == (["train", "--", "x"], None)
