"""``anemoi-dist submit``: put a run, a sweep of runs or any command into SLURM's queue. No torch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anemoi_dist.config.compose import Composed
from anemoi_dist.config.identity import config_changes
from anemoi_dist.config.launcher_checks import parse_time_limit
from anemoi_dist.config.provenance import DERIVED
from anemoi_dist.config.schema import GUARDED, Config
from anemoi_dist.config.tree import is_below, read_yaml
from anemoi_dist.errors import ConfigError, ExitCode, PreflightError, print_message
from anemoi_dist.run.attempt import is_finished
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.prepare import prepare_run

from ..launchers import slurm
from ..launchers.machine import detect_machine
from ..launchers.model_size import check_models
from ..launchers.submission import check_syntax, require_sbatch, sbatch
from ..status import journal
from ..status.inspection import refuse_queued
from ..status.slurm_queue import SlurmQueue
from .arguments import compose_arguments, locate_run
from .sweep import expand


@dataclass(frozen=True)
class Request:
    """A run that shall be put into the queue.

    Attributes
    ----------
    config : Config
        The run's configuration.
    command : tuple[str, ...], optional
        A command to run instead of the trainer.
    by_srun : bool
        Whether srun starts the command, once for each rank.
    dependency : str, optional
        Job that must end before, as in ``afterok:12``.
    after : str, optional
        The run of that job.

    Raises
    ------
    ConfigError
        The launcher of the configuration has no queue.
    """

    config: Config
    command: tuple[str, ...] | None = None
    by_srun: bool = False
    dependency: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if self.config.launcher.kind != "slurm":
            raise ConfigError(
                "launcher",
                self.config.launcher.kind,
                "has no queue",
                fix="launcher=slurm, or leave it out; anemoi-dist train runs it on this machine",
            )

    def directory(self) -> RunDirectory:
        """Return where the run lies."""
        return RunDirectory.locate(self.config.run.root, str(self.config.run.id))

    def script(self) -> str:
        """Return the batch script; the plan is checked on the way."""
        machine, arguments = detect_machine(), []
        if self.command is None:
            slurm.plan(self.config, self.directory(), machine)
        else:
            arguments = [*(["--srun"] if self.by_srun else []), "--", *self.command]
        return slurm.render(
            self.config, self.directory(), python=machine.python, arguments=arguments, dependency=self.dependency
        )


def run(options: argparse.Namespace) -> int:
    """Submit the runs, or with ``--dry-run`` print their batch scripts."""
    return submit_all(_requests(options), dry_run=options.dry_run, build_models=not options.no_check)


def submit_all(requests: Sequence[Request], *, dry_run: bool = False, build_models: bool = True) -> int:
    """Submit runs one after the other, those left out that are finished; return the exit code of the command.

    Parameters
    ----------
    requests : Sequence[Request]
        The runs.
    dry_run : bool, optional
        Print the batch scripts and submit nothing.
    build_models : bool, optional
        Build each model here first: a job would fail only after it has waited in the queue.

    Raises
    ------
    ConfigError
        A model cannot be built, or a script cannot be read by bash.
    PreflightError
        There is no sbatch here, or SLURM refuses a run; those before it were submitted.
    """
    # Everything that can be refused is refused before the first run is submitted: half a sweep is hard to take back.
    requests = [request for request in requests if not _is_finished(request)]
    scripts = [request.script() for request in requests]
    for script in scripts:
        check_syntax(script)
    if dry_run:
        print("\n".join(scripts), end="")
        return ExitCode.FINISHED
    if not requests:
        return ExitCode.FINISHED
    require_sbatch()
    if build_models:
        _check_models([request.config for request in requests if request.command is None])
    for number, request in enumerate(requests):
        try:
            job_id = submit(request)
        except PreflightError as error:
            if number:  # the user must know which jobs are in the queue already
                done = f"{number} of {len(requests)} runs were submitted before this one, {request.config.run.id}"
                raise PreflightError(f"{error}\n  {done}") from error
            raise
        nodes = request.config.launcher.nodes
        place = request.directory().path
        print(f"run {request.config.run.id}: job {job_id}, {nodes} node{'' if nodes == 1 else 's'}, {place}")
    follow = f"status {requests[0].config.run.id} --follow" if len(requests) == 1 else "runs"
    root = requests[0].config.run.root
    print(f"next: anemoi-dist {follow}" + ("" if root == "runs" else f" --root {shlex.quote(root)}"))
    return ExitCode.FINISHED


def _is_finished(request: Request) -> bool:
    """Whether nothing is left to do, which is printed: a job would wait for its turn and end at once."""
    run, max_steps = request.directory(), request.config.training.max_steps
    if request.command is not None or not run.config_file.is_file() or not is_finished(run, max_steps=max_steps):
        return False
    # Finished with other data or another model it is not this run: preparing it refuses, and names the key.
    changes = config_changes(read_yaml(run.config_file), asdict(request.config))
    if any(is_below(change.key, GUARDED.values()) for change in changes):
        return False
    print(
        f"run {run.run_id} is finished (training.max_steps={max_steps}); "
        f"`anemoi-dist resume {run.run_id} training.max_steps={2 * max_steps}` trains on"
    )
    return True


def _requests(options: argparse.Namespace) -> list[Request]:
    if options.words is not None:
        _check_command(options)
    elif options.srun:
        raise ConfigError("--srun", True, "is about the command after --", fix="launcher.ranks_by=srun for a run")
    listed = expand(options.overrides) if options.multirun else [options.overrides]
    files = {"config_file": options.config, "config_dir": options.config_dir}
    requests = [_request(options, compose_arguments(with_queue(overrides), **files)) for overrides in listed]
    # Two jobs in one directory would wait for each other, or the second would resume the first.
    ids = [str(request.config.run.id) for request in requests]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise ConfigError(
            "run.id",
            twice,
            f"would name {ids.count(twice)} runs of this sweep",
            fix="leave run.id out, or sweep it too",
        )
    return requests


def with_queue(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with ``launcher=slurm`` before them where they choose no launcher.

    A configuration file that chooses one still wins: it is laid over the groups.
    """
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
    config = composed.config
    # The id that is derived from the configuration would be the same for every command.
    if options.words is not None and composed.provenance.get("run.id") == DERIVED:
        config.run.id = _command_id(options.words)
    after, dependency = _dependency(options, config)
    command = None if options.words is None else tuple(options.words)
    # Lightning wants a task for each of its ranks.
    by_srun = options.srun or journal.is_anemoi_training(command)
    return Request(config, command=command, by_srun=by_srun, dependency=dependency, after=after)


def _command_id(words: Sequence[str]) -> str:
    """Return a readable name that is a function of the command: the same one continues the same run."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(words[0]).name).strip("-._")[:32]
    digest = hashlib.sha256(json.dumps(list(words)).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return "-".join(filter(None, ("command", name, digest)))


def _dependency(options: argparse.Namespace, config: Config) -> tuple[str | None, str | None]:
    """Return the run to wait for and sbatch's ``--dependency``; without one where that run has ended already."""
    if options.after and options.after_any:
        raise ConfigError("--after", options.after, "excludes --after-any", fix="give one of the two")
    name = options.after or options.after_any
    if not name:
        return None, None
    run = locate_run(name, config.run.root)
    state = run.read_state().state
    submitted = journal.last(journal.read(run), "submit")
    if submitted is None:
        if state == "finished":
            return run.run_id, None
        raise PreflightError(
            f"run {run.run_id} was never submitted and is not finished: there is no job to wait for\n"
            f"  fix: `anemoi-dist submit run.id={run.run_id} ...` first, or leave --after out"
        )
    # SLURM forgets a job soon after its end, and then refuses to wait for it: the run's own record decides.
    job = SlurmQueue().view(str(submitted.job_id))
    if not job.is_over:
        return run.run_id, f"{'afterok' if options.after else 'afterany'}:{job.job_id}"
    if options.after and state != "finished" and job.exit_code != 0:
        raise PreflightError(
            f"run {run.run_id} has ended without being finished ({state}, job {job.job_id} {job.state}); resume it "
            "first, or --after-any"
        )
    return run.run_id, None


def submit(request: Request) -> str:
    """Put one run into the queue and return the job's id.

    Raises
    ------
    PreflightError
        There is no sbatch here, SLURM refuses the job, or the run is queued or running already. Nothing is recorded.
    """
    # Nothing is written before SLURM can be asked: what is refused leaves no trace.
    require_sbatch()
    script, config = request.script(), request.config
    _refuse_other_kind(request)
    refuse_queued(request.directory())
    run = prepare_run(config)
    for folder in (run.slurm_logs_dir, run.scripts_dir):
        folder.mkdir(mode=0o700, exist_ok=True)
    with _submitting(run):
        # Again, now that no other process can submit the run between question and answer.
        refuse_queued(run)
        # It was meant for an earlier start; whoever submits wants the run to continue.
        run.stop_file.unlink(missing_ok=True)
        job_id = sbatch(script, slurm.options(config, run, request.dependency))
        _record(request, run, job_id, script)
    return job_id


def _check_models(configs: Sequence[Config]) -> None:
    """Refuse now what every rank would refuse after the wait in the queue."""
    if not configs:
        return
    print("building the model here first (--no-check leaves that out)", flush=True)
    if unknown := check_models(configs):
        print_message(f"note: the model could not be built here, so the job is the first to try: {unknown}")


@contextlib.contextmanager
def _submitting(run: RunDirectory) -> Iterator[None]:
    """Let one process at a time ask the queue, submit and record it. The run itself is the job's from then on."""
    with (run.scripts_dir / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _record(request: Request, run: RunDirectory, job_id: str, script: str) -> None:
    # A copy for people: SLURM keeps its own, which ends with the job.
    file = run.scripts_dir / f"slurm-{job_id}.sh"
    write_atomically(file, script)
    launcher = request.config.launcher
    command: dict[str, Any] = {} if request.command is None else {"command": list(request.command)}
    journal.note(
        run,
        "submit",
        kind="slurm",
        job_id=job_id,
        script=str(file),
        nodes=launcher.nodes,
        ranks=launcher.nodes * slurm.num_ranks_per_node(launcher),
        time_limit_s=None if launcher.time is None else parse_time_limit(launcher.time),
        after=request.after,
        **command,
    )


def _refuse_other_kind(request: Request) -> None:
    """Refuse a directory that holds another command, or a run of the trainer: its records would be mixed."""
    run = request.directory()
    submitted = journal.last(journal.read(run), "submit")
    before = None if submitted is None else submitted.command
    command = None if request.command is None else list(request.command)
    if run.config_file.is_file() and before != command and (submitted is not None or command is not None):
        what = "another command" if before and command else "a command" if before else "a run of the trainer"
        raise ConfigError("run.id", run.run_id, f"is {what}", fix="take another run.id")
