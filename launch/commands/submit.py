"""``anemoi-dist submit``: put a run, a sweep of runs or any command into SLURM's queue. No torch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anemoi_dist.errors import ConfigError, ExitCode, PreflightError
from anemoi_dist.run.directory import RunDirectory, write_atomically

from .arguments import add_command, compose_arguments, locate_run

if TYPE_CHECKING:
    from anemoi_dist.config.compose import Composed
    from anemoi_dist.config.schema import Config

#: sbatch gives up by itself long before, where slurmctld is down.
_SBATCH_TIMEOUT_S = 180
#: What SLURM says, in small letters -> what to change. The first that matches counts.
_FIXES = (
    ("partition", "launcher.slurm.partition=NAME; `sinfo -s` lists them"),
    ("account", "launcher.slurm.account=NAME; `sacctmgr show associations user=$USER` lists yours"),
    ("qos", "launcher.slurm.qos=NAME"),
    ("time limit", "a shorter launcher.time; `sinfo -s` shows the limits"),
    ("feature", "launcher.slurm.constraint=NAME; `sinfo -o '%n %f'` lists them"),
    ("unrecognized option", "launcher.slurm.options: `man sbatch` lists the names"),
    ("generic resource", "launcher.gpus_per_node; `sinfo -o '%n %G'` shows what there is"),
    ("processors", "fewer launcher.nodes or launcher.ranks; `sinfo -N -l` shows what there is"),
    ("node", "fewer launcher.nodes, launcher.gpus_per_node or launcher.ranks; `sinfo -N -l` shows what there is"),
    ("controller", "try again when slurmctld answers (`scontrol ping`)"),
)
_OTHER_FIX = "`anemoi-dist submit --dry-run ...` prints the batch script"


def add_commands(commands: Any) -> None:
    """Add ``submit``."""
    submit = add_command(
        commands, "submit", _submit, "put a run into SLURM's queue; after --, any other command", groups=True
    )
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    submit.add_argument("--multirun", action="store_true", help="one run for each combination: key=a,b key=range(1,4)")
    submit.add_argument("--after", metavar="RUN", help="start when that run is finished, and not at all if it fails")
    submit.add_argument("--after-any", metavar="RUN", help="start when that run has ended, however")
    submit.add_argument("--no-check", action="store_true", help="submit without having built the model here first")
    submit.add_argument("--srun", action="store_true", help="start the command after -- by srun, one task a rank")


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return the arguments of ``anemoi-dist submit``, and after ``--`` those of the command; None without one."""
    if arguments[:1] != ["submit"] or "--" not in arguments:
        return list(arguments), None
    place = list(arguments).index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


@dataclass(frozen=True)
class Request:
    """What is to be put into the queue.

    Attributes
    ----------
    config : Config
        The run's configuration.
    words : tuple[str, ...], optional
        A command to run instead of our trainer.
    by_srun : bool
        Whether srun starts the command, once for each rank.
    dependency : str, optional
        What must happen before, as in ``afterok:12``.
    after : str, optional
        The run that this is about.
    """

    config: Config
    words: tuple[str, ...] | None = None
    by_srun: bool = False
    dependency: str | None = None
    after: str | None = None

    def directory(self) -> RunDirectory:
        """Return where the run lies."""
        return RunDirectory.locate(self.config.run.root, str(self.config.run.id))

    def script(self) -> str:
        """Return the batch script; the plan is checked on the way."""
        from ..launchers import slurm
        from ..launchers.machine import look

        machine, arguments = look(), []
        if self.words is None:
            slurm.plan(self.config, self.directory(), machine)
        else:
            arguments = [*(["--srun"] if self.by_srun else []), "--", *self.words]
        return slurm.render(
            self.config, self.directory(), python=machine.python, arguments=arguments, dependency=self.dependency
        )


def _submit(options: argparse.Namespace) -> int:
    requests = [request for request in _requests(options) if not _is_finished(request)]
    scripts = [request.script() for request in requests]
    for script in scripts:
        _check_syntax(script)
    if options.dry_run:
        print("\n".join(scripts), end="")
        return ExitCode.FINISHED
    if requests:
        _refuse_without_sbatch()
    if options.words is None and not options.no_check:
        _check_models(requests)
    for number, request in enumerate(requests):
        try:
            job_id = submit(request)
        except PreflightError as error:
            if number:
                done = f"{number} of {len(requests)} runs were submitted before this one, {request.config.run.id}"
                raise PreflightError(f"{error}\n  {done}") from error
            raise
        launcher = request.config.launcher
        nodes = f"{launcher.nodes} node{'' if launcher.nodes == 1 else 's'}"
        print(f"run {request.config.run.id}: job {job_id}, {nodes}, {request.directory().path}")
    if requests:
        follow = f"status {requests[0].config.run.id} --follow" if len(requests) == 1 else "runs"
        root = requests[0].config.run.root
        print(f"next: anemoi-dist {follow}" + ("" if root == "runs" else f" --root {shlex.quote(root)}"))
    return ExitCode.FINISHED


def _is_finished(request: Request) -> bool:
    """Say so where nothing is left to do: a job would wait for its turn and end at once."""
    from anemoi_dist.config.identity import config_changes
    from anemoi_dist.config.schema import GUARDED
    from anemoi_dist.config.tree import read_yaml
    from anemoi_dist.run.attempt import is_finished

    run, max_steps = request.directory(), request.config.training.max_steps
    if request.words is not None or not run.config_file.is_file() or not is_finished(run, max_steps=max_steps):
        return False
    changes = config_changes(read_yaml(run.config_file), asdict(request.config))
    if any(change.key == node or change.key.startswith(f"{node}.") for change in changes for node in GUARDED.values()):
        return False  # of another run: preparing it says what is wrong
    print(
        f"run {run.run_id} is finished (training.max_steps={max_steps}); "
        f"`anemoi-dist resume {run.run_id} training.max_steps={2 * max_steps}` trains on"
    )
    return True


def _requests(options: argparse.Namespace) -> list[Request]:
    from .sweep import expand

    if options.words is not None:
        _check_command(options)
    elif options.srun:
        raise ConfigError("--srun", True, "is about the command after --", fix="launcher.ranks_by=srun for a run")
    listed = expand(options.overrides) if options.multirun else [options.overrides]
    requests = [_request(options, compose_arguments(options, _in_a_queue(overrides))) for overrides in listed]
    ids = [str(request.config.run.id) for request in requests]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise ConfigError(
            "run.id",
            twice,
            f"would name {ids.count(twice)} runs of this sweep",
            fix="leave run.id out, or sweep it too",
        )
    return requests


def _in_a_queue(overrides: Sequence[str]) -> list[str]:
    """Add the launcher that has a queue where the user chooses none; a file that chooses one lies over it."""
    chosen = any(text.lstrip("+~").partition("=")[0] == "launcher" for text in overrides)
    return [*overrides] if chosen else ["launcher=slurm", *overrides]


def _check_command(options: argparse.Namespace) -> None:
    if not options.words:
        raise ConfigError("--", "", "is followed by no command", fix="-- torchrun train.py, or leave -- out")
    for text in options.overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key != "launcher" and not key.startswith(("launcher.", "run.")):
            raise ConfigError(
                key, text.partition("=")[2], "has no effect on a command", fix="only launcher.* and run.* have"
            )
    if options.config is not None:
        raise ConfigError("--config", str(options.config), "has no effect on a command", fix="launcher.profile=FILE")


def _request(options: argparse.Namespace, composed: Composed) -> Request:
    from anemoi_dist.config.provenance import DERIVED

    config = composed.config
    if config.launcher.kind != "slurm":
        raise ConfigError(
            "launcher",
            config.launcher.kind,
            "has no queue",
            fix="launcher=slurm, or leave it out; anemoi-dist train runs it on this machine",
        )
    if options.words is not None and composed.provenance.get("run.id") == DERIVED:
        config.run.id = _command_id(options.words)
    dependency, after = _dependency(options, config)
    words = None if options.words is None else tuple(options.words)
    return Request(config, words=words, by_srun=options.srun, dependency=dependency, after=after)


def _command_id(words: Sequence[str]) -> str:
    """Return a readable name that is a function of the command: the same one continues the same run."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(words[0]).name).strip("-._")[:32]
    digest = hashlib.sha256(json.dumps(list(words)).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return "-".join(filter(None, ("command", name, digest)))


def _dependency(options: argparse.Namespace, config: Config) -> tuple[str | None, str | None]:
    """Return what SLURM is told to wait for, and the run's name; nothing where that run has ended already."""
    from ..status import journal
    from ..status.slurm_queue import SlurmQueue

    if options.after and options.after_any:
        raise ConfigError("--after", options.after, "excludes --after-any", fix="give one of the two")
    name = options.after or options.after_any
    if not name:
        return None, None
    run = locate_run(name, config.run.root)
    submitted = journal.last(journal.read(run), "submit")
    if submitted is None:
        if run.read_state()["state"] == "finished":
            return None, run.run_id
        raise PreflightError(
            f"run {run.run_id} was never submitted and is not finished: there is no job to wait for\n"
            f"  fix: `anemoi-dist submit run.id={run.run_id} ...` first, or leave --after out"
        )
    view = SlurmQueue().views([submitted["job_id"]])[submitted["job_id"]]
    if not view.is_over:
        return f"{'afterok' if options.after else 'afterany'}:{view.job_id}", run.run_id
    state = run.read_state()["state"]
    if options.after and state != "finished" and view.exit_code != 0:
        raise PreflightError(
            f"run {run.run_id} has ended without being finished ({state}, job {view.job_id} {view.state}); resume it "
            "first, or --after-any"
        )
    return None, run.run_id


def _check_syntax(script: str) -> None:
    """Refuse what bash cannot read: the user's own setup lines are part of the script."""
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if checked.returncode:
        said = " ".join(checked.stderr.split())
        raise ConfigError("launcher.slurm.setup", "", f"makes a script that bash cannot read: {said}", fix="mend it")


def submit(request: Request) -> str:
    """Put one run into the queue and return the job's id.

    Raises
    ------
    PreflightError
        There is no sbatch here, SLURM refuses the job, or the run is queued or running already. Nothing is recorded.
    """
    from anemoi_dist.run.prepare import prepare_run

    from ..launchers import slurm

    _refuse_without_sbatch()
    script, config = request.script(), request.config
    _refuse_other_kind(request)
    refuse_queued(request.directory())
    run = prepare_run(config)
    for folder in (run.slurm_logs_dir, run.scripts_dir):
        folder.mkdir(mode=0o700, exist_ok=True)
    with _submitting(run):
        refuse_queued(run)
        # Asked of an earlier life; the one who submits wants the run to go on.
        run.stop_file.unlink(missing_ok=True)
        job_id = _sbatch(script, slurm.options(config, run, request.dependency))
        _record(request, run, job_id, script)
    return job_id


def _refuse_without_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise PreflightError(
            "there is no sbatch on this machine: submit on a login node of the cluster, or run "
            "`anemoi-dist train launcher=local` here"
        )


def _check_models(requests: Sequence[Request]) -> None:
    """Refuse now what every rank would refuse once the queue has been waited in."""
    from ..launchers.model_size import check_models

    if unknown := check_models([request.config for request in requests]):
        print(f"note: the model could not be built here, so the job is the first to try: {unknown}", file=sys.stderr)


@contextlib.contextmanager
def _submitting(run: RunDirectory) -> Iterator[None]:
    """Let one process at a time ask the queue, submit and record it. The run itself is the job's from then on."""
    with (run.scripts_dir / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _record(request: Request, run: RunDirectory, job_id: str, script: str) -> None:
    from anemoi_dist.config.launcher_checks import parse_time_limit

    from ..launchers import slurm
    from ..status import journal

    file = run.scripts_dir / f"slurm-{job_id}.sh"
    write_atomically(file, script)
    launcher = request.config.launcher
    record: dict[str, Any] = {
        "kind": "slurm",
        "job_id": job_id,
        "script": str(file),
        "nodes": launcher.nodes,
        "ranks": launcher.nodes * slurm.num_ranks_per_node(launcher),
        "time_limit_s": None if launcher.time is None else parse_time_limit(launcher.time),
        "after": request.after,
    }
    if request.words is not None:
        record["command"] = list(request.words)
    journal.note(run, "submit", **record)


def _refuse_other_kind(request: Request) -> None:
    """A directory holds a run of our trainer or of one command: what it says about itself would be wrong else."""
    from ..status import journal

    run = request.directory()
    submitted = journal.last(journal.read(run), "submit")
    before = None if submitted is None else submitted.get("command")
    words = None if request.words is None else list(request.words)
    if run.config_file.is_file() and before != words and (submitted is not None or words is not None):
        what = "another command" if before and words else "a command" if before else "a run of the trainer"
        raise ConfigError("run.id", run.run_id, f"is {what}", fix="take another run.id")


def refuse_queued(run: RunDirectory) -> None:
    """Raise where SLURM has a job of this run.

    Raises
    ------
    PreflightError
        There is one, or SLURM, which was given one, does not answer.
    """
    from ..status import journal
    from ..status.slurm_queue import SlurmQueue

    submitted = journal.last(journal.read(run), "submit")
    if submitted is None:
        return
    job_id = str(submitted["job_id"])
    view = SlurmQueue().views([job_id])[job_id]
    if not view.is_over:
        where = f" on {view.nodes}" if view.nodes else f" ({view.reason})" if view.reason else ""
        raise PreflightError(
            f"run {run.run_id} is job {job_id} already, which is {view.state}{where}; wait for it, "
            f"`anemoi-dist cancel {run.run_id}`, or take another run.id"
        )


def _sbatch(script: str, options: Mapping[str, Any]) -> str:
    from ..launchers import slurm

    try:
        answer = subprocess.run(
            slurm.SBATCH,
            input=script,
            env=_environment(options),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SBATCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        name = options["job-name"]
        raise PreflightError(
            f"sbatch did not answer within {_SBATCH_TIMEOUT_S} s; `squeue --me --name={name}` says whether it was heard"
        ) from error
    except OSError as error:
        raise PreflightError(f"sbatch cannot be run: {error}") from error
    for line in answer.stderr.splitlines() if answer.returncode == 0 else ():
        print(line, file=sys.stderr)  # a site's own remarks
    job_id = answer.stdout.strip().splitlines()[-1].partition(";")[0] if answer.stdout.strip() else ""
    if answer.returncode or not job_id.isdecimal():
        lines = (" ".join(line.removeprefix("sbatch: error: ").split()) for line in answer.stderr.splitlines())
        said = "; ".join(filter(None, lines)) or f"exit code {answer.returncode}"
        fix = next((fix for word, fix in _FIXES if word in said.lower()), _OTHER_FIX)
        raise PreflightError(f"SLURM refuses the job: {said}\n  fix: {fix}")
    return job_id


def _environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Return this environment without the variables that would overrule what the script says."""
    spelled = {"time": "TIMELIMIT", "gpus-per-node": "GPUS_PER_NODE"}
    said = {f"SBATCH_{spelled.get(name, name.replace('-', '_').upper())}" for name in options} | {"SBATCH_NO_REQUEUE"}
    return {name: value for name, value in os.environ.items() if name not in said}
