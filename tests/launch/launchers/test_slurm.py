"""Batch scripts: as expected, and harmless whatever is in them."""

from __future__ import annotations

import copy
import random
import subprocess
from pathlib import Path

import pytest
from support.minislurm import MiniSlurm

from anemoi_dist.config.compose import compose
from anemoi_dist.config.launcher_checks import check_launcher
from anemoi_dist.config.schema import Config, LauncherConfig
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

    def __init__(self, launcher: LauncherConfig, rng: random.Random, spoiled: Path) -> None:
        parts = [rng.choice(HOSTILE).replace("{spoiled}", str(spoiled)) for _ in range(rng.choice((1, 1, 2)))]
        self.text = "".join(parts).replace("{{", "{").replace("}}", "}")
        self.place = rng.choice(("path", "argument", "partition", "account", "option", "name", "module", "interface"))
        self.run, self.arguments = RunDirectory(Path("/runs/first")), ("--", "true")
        if self.place == "path":
            self.run = RunDirectory(Path(f"/runs/{self.text}/first"))
        elif self.place == "argument":
            self.arguments = ("--", "echo", self.text)
        elif self.place in ("partition", "account"):
            setattr(launcher.slurm, self.place, self.text)
        elif self.place == "option":
            launcher.slurm.options = {"comment": self.text}
        elif self.place == "name":
            launcher.slurm.options = {self.text: "x"}
        elif self.place == "module":
            launcher.slurm.modules = [self.text]
        else:
            launcher.slurm.interface = self.text


#: Reads each script, then runs it, in one shell; `module` would be the cluster's own.
RUN_ALL = """
module() { :; }
for script in "$1"/*.sh; do
    bash -n "$script" 2> "$script.errors" || echo "$script" >> "$1/unreadable"
    ( set --; source "$script" ) > "$script.words" 2> /dev/null
    [ ! -e "$2" ] || { echo "$script" >> "$1/spoiling"; rm -rf "$2"; }
done
"""


def test_hostile_values_are_refused_or_harmless(tmp_path: Path) -> None:
    """200 of them: one ConfigError, or a script that bash can read and that hands every word on as it was."""
    spoiled, folder, refused = tmp_path / "spoiled", tmp_path / "scripts", 0
    folder.mkdir()
    # It stands for the interpreter: prints what it got.
    show = tmp_path / "show"
    show.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    show.chmod(0o755)
    plain, harmless = configured(), {}
    for seed in range(200):
        config = copy.deepcopy(plain)
        spoilt = Spoilt(config.launcher, random.Random(seed), spoiled)
        try:
            check_launcher(config.launcher)
            script = slurm.render(config, spoilt.run, python=str(show), arguments=spoilt.arguments)
        except ConfigError:
            refused += 1
            continue
        lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert len(lines) == len(slurm.options(config, spoilt.run)), "every option is one line"
        (folder / f"{seed:03}.sh").write_text(script)
        harmless[seed] = spoilt
    subprocess.run(["bash", "-c", RUN_ALL, "_", str(folder), str(spoiled)], check=True, stdin=subprocess.DEVNULL)
    for name in ("unreadable", "spoiling"):
        assert not (folder / name).exists(), (folder / name).read_text()
    for seed, spoilt in harmless.items():
        words = [word.decode() for word in (folder / f"{seed:03}.sh.words").read_bytes().split(b"\0")[:-1]]
        expected = ["-m", "anemoi_dist.launch.job", str(spoilt.run.path), *spoilt.arguments]
        assert words == expected, (seed, spoilt.place, spoilt.text)
    assert refused > 30 and len(harmless) > 60, (refused, len(harmless))


def test_slurm_reads_what_was_written(cluster: MiniSlurm, tmp_path: Path) -> None:
    """The values survive SLURM's own reader of #SBATCH lines, which is no shell."""
    texts = [t.replace("{spoiled}", "x").replace("{{", "{").replace("}}", "}") for t in HOSTILE]
    texts = [t for t in texts if t.strip() and t.isprintable() and len(t) < 100]
    assert len(texts) > 20
    plain, jobs = configured(), {}
    run = RunDirectory(tmp_path / "it's 50% #1" / "first")
    for text in texts:
        config = copy.deepcopy(plain)
        config.launcher.slurm.options = {"comment": text, "hold": True}
        done = subprocess.run(
            slurm.SBATCH,
            input=rendered(config, run),
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (text, done.stderr)
        jobs[done.stdout.strip()] = text
    described = cluster.run("scontrol", "show", "job").split("\n\n")
    shown = {description.partition("JobId=")[2].partition(" ")[0]: description for description in described}
    for job_id, text in jobs.items():
        assert f"   Comment={text} \n" in shown[job_id], (text, shown[job_id])
        # SLURM shows the pattern with its %%; what it writes to is tested where jobs run.
        log = f"StdOut={str(run.path).replace('%', '%%')}/logs/slurm-{job_id}.log"
        assert log in shown[job_id].replace("50%/", "50%%/").replace("50% ", "50%% "), shown[job_id]
    cluster.cancel_all()
