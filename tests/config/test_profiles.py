"""Cluster profiles and what ``launcher`` may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from anemoi_dist.config.compose import Composed, compose
from anemoi_dist.config.launcher_checks import format_time_limit, parse_time_limit
from anemoi_dist.config.profiles import profile_names, read_profile
from anemoi_dist.errors import ConfigError


def slurm(*overrides: str, **more: Path) -> Composed:
    return compose(["launcher=slurm", "training.global_batch_size=16", *overrides], **more)  # type: ignore[arg-type]


def test_what_the_user_says_wins_over_the_profile_and_that_over_the_group(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "gpus_per_node: 4\nmax_restarts: 7\nmax_retries: 8\n"
        "slurm: {partition: gpu, account: ours, setup: ['a'], options: {mem: 1G, exclusive: true}}\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        f"launcher: {{profile: {profile}, max_restarts: 9, slurm: {{account: mine, options: {{mem: 2G}}}}}}\n"
    )
    composed = slurm("launcher.max_retries=1", "launcher.slurm.setup=[]", config_file=config)
    launcher = composed.config.launcher
    assert (launcher.gpus_per_node, launcher.max_restarts, launcher.max_retries, launcher.max_requeues) == (
        4,
        9,
        1,
        100,
    )
    assert (launcher.slurm.partition, launcher.slurm.account, launcher.slurm.setup) == ("gpu", "mine", [])
    assert launcher.slurm.options == {"mem": "2G", "exclusive": True}
    assert composed.provenance["launcher.gpus_per_node"] == str(profile)
    assert composed.provenance["launcher.slurm.account"] == str(config)
    other = slurm(f"launcher.profile={profile}", "launcher.slurm.partition=null")
    assert other.config.launcher.slurm.partition is None and other.config.launcher.gpus_per_node == 4
    assert slurm("launcher.profile=null", config_file=config).config.launcher.gpus_per_node is None
    assert other.config.run.id == slurm().config.run.id, "where a run runs is not what it is"


def test_a_run_that_goes_on_elsewhere_finds_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("gpus_per_node: 4")
    monkeypatch.chdir(tmp_path)
    assert slurm("launcher.profile=mine.yaml").config.launcher.profile == str(tmp_path / "mine.yaml")
    assert slurm("launcher.profile=example").config.launcher.profile == "example"


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_of_the_package_composes(name: str) -> None:
    assert slurm(f"launcher.profile={name}").config.launcher.profile == name


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("partition: gpu", r"not a key of a profile .*\n.*valid: nodes.*\n.*slurm: \{partition: ...\}"),
        ("slurm: {partitoin: gpu}", r"(?s)slurm.partitoin='gpu'.*did you mean partition"),
        ("kind: local", "launcher.kind on the command line"),
        ("slurm: 3", "must be a mapping"),
        ("- a", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        slurm(f"launcher.profile={tmp_path}/p.yaml")


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"(?s)nearest: example.*valid: example, minislurm"):
        read_profile("exampel")
    with pytest.raises(ConfigError, match="does not exist"):
        read_profile("./example.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        read_profile("../profiles/../../etc/passwd")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:10:00", 600),
        ("24:00:00", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
        ("100:00:00", 360000),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert parse_time_limit(text) == seconds
    assert parse_time_limit(format_time_limit(seconds)) == seconds


@pytest.mark.parametrize(
    "text", ["90", "90:00", "", "1:2:3", "-1:00:00", "00:60:00", "00:00:61", "1-", "1d", "24:00:00\n"]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.time"):
        parse_time_limit(text)


def test_a_time_that_yaml_took_for_a_number_says_what_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("launcher: {time: 86400}\n")
    with pytest.raises(ConfigError, match="24:00:00 for seconds"):
        slurm(config_file=file)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["launcher.time=00:05:00"], "leaves no time to train"),
        (["launcher.time=00:02:00"], "fix: launcher.time=00:24:00$"),
        (["launcher.time=00:06:00"], r"fix: launcher.slurm.signal_s=30, or launcher.time=00:24:00$"),
        (["launcher.time=10"], "must be HH:MM:SS, D-HH:MM:SS, D-HH:MM or D-HH"),
        (["launcher.slurm.setup=[false]"], r"setup=False: is not a line of shell\n  fix: .*\['false'\]"),
        (["launcher.kind=local", "launcher.nodes=2"], "launcher=slurm, launcher=mpi"),
        (["+launcher.slurm.options.nodes=3"], "launcher.nodes sets it"),
        (["+launcher.slurm.options.output=x"], "leave it out"),
        (["+launcher.slurm.options.part=low"], "sbatch takes it for partition"),
        (["launcher.slurm.options={--mem: 3}"], "is not"),
        (["launcher.slurm.options={mail_type: END}"], "long name without dashes in front"),
        (["launcher.slurm.options={mem: [1,2]}"], "must be a text"),
        (["launcher.slurm.partition='a\nb'"], "one line of text"),
        (["launcher.slurm.partition=''"], "one line of text"),
        (["launcher.slurm.modules=['gcc; rm']"], "not a module's name"),
        (["launcher.slurm.modules=['--force']"], "not a module's name"),
        (["launcher.slurm.interface='ib0 ib1'"], "not a network interface"),
        (["launcher.slurm.signal_s=0"], "at least 1"),
    ],
)
def test_what_a_job_may_not_say(overrides: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        slurm(*overrides)


@pytest.mark.parametrize(
    "override",
    [
        "launcher.nodes=2",
        "launcher.profile=example",
        "launcher.time=01:00:00",
        "launcher.max_requeues=3",
        "launcher.ranks_by=srun",
        "launcher.slurm.partition=gpu",
    ],
)
def test_what_has_no_effect_on_this_machine_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)launcher.*fix: launcher=slurm"):
        compose([override])
