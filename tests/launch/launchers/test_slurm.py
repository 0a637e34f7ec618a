"""Batch scripts: as expected, and harmless whatever is in them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from support.minislurm import MiniSlurm

from anemoi_dist.config.compose import compose
from anemoi_dist.config.schema import Config
from anemoi_dist.errors import ConfigError
from anemoi_dist.launch.launchers import slurm
from anemoi_dist.launch.launchers.base import Machine
from anemoi_dist.run.directory import RunDirectory

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = [
    "a b",
    "$(touch {spoiled})",
    "`touch {spoiled}`",
    "'; touch {spoiled}; '",
    '"; touch {spoiled}; "',
    "; touch {spoiled}",
    "& touch {spoiled} &",
    "| touch {spoiled}",
    "> {spoiled}",
    "\ntouch {spoiled}\n",
    "\n#SBATCH --wrap='touch {spoiled}'\n",
    "\r\ntouch {spoiled}",
    "\\",
    "\\\\\n",
    "#x",
    "-x",
    "--export=NONE",
    "--wrap=touch {spoiled}",
    "!!",
    "*",
    "~",
    "{{a,b}}",
    "$HOME",
    "${{IFS}}touch${{IFS}}{spoiled}",
    "%j",
    "é ü 漢字 \N{PILE OF POO}",
    "\u202e",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "x" * 300,
    "",
    " ",
    "=",
    "a=b",
    "(",
    ")",
    "<<EOF",
    "EOF\n",
    "$'\\n'",
]


def configured(*overrides: str) -> Config:
    return compose(["launcher=slurm", "run.id=first", "training.global_batch_size=16", *overrides]).config


def rendered(config: Config, run: RunDirectory, **more: object) -> str:
    return slurm.render(config, run, python="/env/bin/python", **more)  # type: ignore[arg-type]


CASES = {
    "smallest": ([], "/runs/first", {}),
    "cluster": (
        [
            "launcher.nodes=2",
            "launcher.profile=example",
            "launcher.time=1-12:00:00",
            "launcher.slurm.account=weather",
            "launcher.slurm.modules=[gcc/12,cuda/12.4]",
            "launcher.slurm.setup=[ulimit -c 0,source /env/activate]",
            "+launcher.slurm.options.mail-type=END",
        ],
        "/runs/first",
        {"dependency": "afterok:12"},
    ),
    "awkward": (
        ["launcher.slurm.constraint='a&b|[c*2]'", "+launcher.slurm.options.comment='it is \"#1\"; $(id)'"],
        "/scratch/it's; 50% $HOME/first",
        {"arguments": ("--srun", "--", "echo", "$(id)", "a b", "")},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name: str) -> None:
    overrides, path, more = CASES[name]
    config = configured(*overrides)
    assert rendered(config, RunDirectory(Path(path)), **more) == (GOLDEN / f"{name}.sh").read_text()


def test_the_plan_has_the_script_and_needs_no_cluster() -> None:
    config = configured("launcher.nodes=2", "launcher.gpus_per_node=4")
    plan = slurm.plan(config, RunDirectory(Path("/runs/first")), Machine(0, {}, "/env/bin/python"))
    assert (plan.nodes, plan.ranks_per_node, plan.world_size, plan.batches.micro_size) == (2, 4, 8, 2)
    assert plan.script == rendered(config, RunDirectory(Path("/runs/first")))


def test_ranks_on_each_node() -> None:
    assert slurm.num_ranks_per_node(configured().launcher) == 2
    assert slurm.num_ranks_per_node(configured("launcher.gpus_per_node=4").launcher) == 4
    assert slurm.num_ranks_per_node(configured("launcher.gpus_per_node=4", "launcher.ranks=1").launcher) == 1
    config = configured("launcher.gpus_per_node=2", "launcher.ranks=4")
    with pytest.raises(ConfigError, match="more than one rank a GPU"):
        slurm.plan(config, RunDirectory(Path("/runs/first")), Machine(0, {}, "/env/bin/python"))


class Spoilt:
    """A place for hostile text: where it goes, and what a script made of it must be worth."""

    def __init__(self, config: Config, seed: int, spoiled: Path) -> None:
        rng = random.Random(seed)
        parts = [rng.choice(HOSTILE).replace("{spoiled}", str(spoiled)) for _ in range(rng.choice((1, 1, 2)))]
        self.text = "".join(parts).replace("{{", "{").replace("}}", "}")
        self.place = rng.choice(("path", "argument", "partition", "account", "option", "name", "module", "interface"))
        self.run, self.arguments = RunDirectory(Path("/runs/first")), ("--", "true")
        launcher = config.launcher.slurm
        if self.place == "path":
            self.run = RunDirectory(Path(f"/runs/{self.text}/first"))
        elif self.place == "argument":
            self.arguments = ("--", "echo", self.text)
        elif self.place in ("partition", "account"):
            setattr(launcher, self.place, self.text)
        elif self.place == "option":
            launcher.options = {"comment": self.text}
        elif self.place == "name":
            launcher.options = {self.text: "x"}
        elif self.place == "module":
            launcher.modules = [self.text]
        else:
            launcher.interface = self.text


def test_hostile_values_are_refused_or_harmless(tmp_path: Path) -> None:
    """200 of them: one ConfigError, or a script that bash can read and that hands every word on as it was."""
    from anemoi_dist.config.launcher_checks import check_launcher

    spoiled, seen = tmp_path / "spoiled", {"refused": 0, "harmless": 0}
    # It stands for the interpreter: prints what it got.
    show = tmp_path / "show"
    show.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    show.chmod(0o755)
    for seed in range(200):
        config = configured()
        spoilt = Spoilt(config, seed, spoiled)
        try:
            check_launcher(config.launcher)
            script = slurm.render(config, spoilt.run, python=str(show), arguments=spoilt.arguments)
        except ConfigError:
            seen["refused"] += 1
            continue
        checked = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
        assert checked.returncode == 0, (seed, spoilt.place, spoilt.text, checked.stderr)
        # `module` would be the cluster's own.
        done = subprocess.run(["bash", "-c", f"module() {{ :; }}\n{script}"], capture_output=True, check=False)
        words = [word.decode() for word in done.stdout.split(b"\0")[:-1]]
        assert words == ["-m", "anemoi_dist.launch.job", str(spoilt.run.path), *spoilt.arguments], (seed, spoilt.text)
        assert not spoiled.exists(), (seed, spoilt.place, spoilt.text)
        lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert len(lines) == len(slurm.options(config, spoilt.run)), "every option is one line"
        seen["harmless"] += 1
    assert seen["refused"] > 30 and seen["harmless"] > 60, seen


def test_slurm_reads_what_was_written(cluster: MiniSlurm, tmp_path: Path) -> None:
    """The values survive SLURM's own reader of #SBATCH lines, which is no shell."""
    texts = [t.replace("{spoiled}", "x").replace("{{", "{").replace("}}", "}") for t in HOSTILE]
    texts = [t for t in texts if t.strip() and t.isprintable() and len(t) < 100]
    assert len(texts) > 20
    for text in texts:
        config = configured()
        config.launcher.slurm.options = {"comment": text, "hold": True}
        run = RunDirectory(tmp_path / "it's 50% #1" / "first")
        done = subprocess.run(
            slurm.SBATCH,
            input=rendered(config, run),
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (text, done.stderr)
        shown = cluster.run("scontrol", "show", "job", done.stdout.strip())
        assert f"   Comment={text} \n" in shown, (text, shown)
        # SLURM shows the pattern with its %%; what it writes to is tested where jobs run.
        assert f"StdOut={str(run.path).replace('%', '%%')}/logs/slurm-{done.stdout.strip()}.log" in shown.replace(
            "50%/", "50%%/"
        ).replace("50% ", "50%% "), shown
    cluster.cancel_all()
