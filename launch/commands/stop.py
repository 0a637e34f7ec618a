"""``anemoi-dist stop``, ``cancel`` and ``resume``: end a run gently, at once, and let it go on. No torch."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from anemoi_dist.errors import ConfigError, ExitCode, PreflightError
from anemoi_dist.run.directory import RunDirectory

from ..status import journal
from ..status.derive import RunStatus
from ..status.files import Facts, gather, launcher_alive, whole
from ..status.slurm_queue import SlurmQueue
from .arguments import add_command, locate_run
from .status import add_run_argument, look_at

#: Between two signals to a launcher on this machine. SLURM has its own (KillWait).
_GRACE_S = 5.0
#: The first lets the ranks save if they can in that time, the second kills them, the third does not even ask.
_SIGNALS = {"SIGTERM": signal.SIGTERM, "a second SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
_LOOK_S = 0.05


def add_commands(commands: Any) -> None:
    """Add ``stop``, ``cancel`` and ``resume``."""
    add_run_argument(add_command(commands, "stop", _stop, "ask a run to save and stop"))
    add_run_argument(add_command(commands, "cancel", _cancel, "end a run now, whether it has saved or not"))
    resume = add_command(commands, "resume", _resume, "let a run go on, with other settings where some are given")
    add_run_argument(resume)
    resume.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="settings, in Hydra's grammar")


# stop


def _stop(options: argparse.Namespace) -> int:
    run = locate_run(options.run, options.root)
    status = look_at(run)
    if status.may_go_on and gather(run).is_command:
        raise ConfigError(
            "RUN", options.run, "is a command, which hears no stop request", fix=f"anemoi-dist cancel {run.run_id}"
        )
    if not status.may_go_on:
        # The file would wait for the next start, and stop that.
        raise ConfigError("RUN", options.run, f"has nothing to stop: it is {_described(status)}")
    run.control_dir.mkdir(mode=0o700, exist_ok=True)
    journal.note_if_possible(run, "stop")
    run.stop_file.touch()
    print(f"{status.run_id} is {_described(status)}")
    print(_what_follows(status))
    for note in status.notes:
        print(f"note: {note}")
    return ExitCode.FINISHED


def _what_follows(status: RunStatus) -> str:
    name = status.run_id
    if status.state in ("submitted", "requeued"):
        return (
            f"it keeps its place in the queue, and saves and stops at the first step once it runs; "
            f"`anemoi-dist cancel {name}` takes it out of the queue"
        )
    if status.state == "silent":
        return (
            f"ranks agree on a stop at the end of a step, which a silent rank may never reach; "
            f"`anemoi-dist cancel {name}` ends it without saving"
        )
    return (
        f"it saves at the end of the step, stops, and ends with code 75; `anemoi-dist status {name} --follow` tells "
        f"when, `anemoi-dist resume {name}` goes on"
    )


def _described(status: RunStatus) -> str:
    return f"{status.state} ({status.detail})" if status.detail else status.state


# cancel


def _cancel(options: argparse.Namespace) -> int:
    run = locate_run(options.run, options.root)
    facts, status = gather(run), look_at(run)
    if facts.job_id:
        _cancel_job(run, facts.job_id, status)
    elif not status.may_go_on:
        raise ConfigError("RUN", options.run, f"has nothing to cancel: it is {_described(status)}")
    else:
        _cancel_process(run, facts)
    print(f"what was saved last is intact; `anemoi-dist resume {status.run_id}` goes on from it")
    return ExitCode.FINISHED


def _cancel_job(run: RunDirectory, job_id: str, status: RunStatus) -> None:
    queue = SlurmQueue()
    view = queue.views([job_id]).get(job_id)  # raises where SLURM does not answer: nothing is noted then
    if view is None or view.is_over:
        raise ConfigError("RUN", status.run_id, f"has nothing to cancel: it is {_described(status)}")
    # Before the processes hear of it: what they do when they are ended is no request to go back into the queue.
    journal.note_if_possible(run, "cancel", job_id=job_id)
    queue.cancel(job_id)
    print(f"job {job_id} is cancelled; it was {_described(status)}")


def _cancel_process(run: RunDirectory, facts: Facts) -> None:
    """End the launcher on this machine; its ranks end with it."""
    event = journal.last(facts.launch, "launch")
    if event is None:
        host = f" on {facts.owner_host}" if facts.owner_host else ""
        raise PreflightError(
            f"run {run.run_id} was not started by anemoi-dist{host}: end what started it, torchrun for one; "
            f"`anemoi-dist stop {run.run_id}` asks it to save and stop"
        )
    host, pid = str(event.get("host", "?")), whole(event.get("pid"))
    if host != socket.gethostname():
        raise PreflightError(
            f"run {run.run_id} was started on {host} by process {pid}: cancel it there; "
            f"`anemoi-dist stop {run.run_id}` asks it from here to save and stop"
        )
    journal.note_if_possible(run, "cancel")
    by = _end(facts, pid or 0)
    print(f"process {pid} was gone already" if by is None else f"process {pid} was ended by {by}")


def _end(facts: Facts, pid: int) -> str | None:
    """End the launcher and return by what; its pid may have been given to another process meanwhile: never that one."""
    try:
        handle = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        return None
    try:
        # The handle stands for one process for good; is it the one that was noted?
        if not launcher_alive(facts.launch):
            return None
        for name, number in _SIGNALS.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            deadline = time.monotonic() + _GRACE_S
            while launcher_alive(facts.launch):
                if time.monotonic() > deadline:
                    break
                time.sleep(_LOOK_S)
            else:
                return name
        raise PreflightError(f"process {pid} did not end, not even by SIGKILL: it may wait for a file system")
    finally:
        os.close(handle)


# resume


def _resume(options: argparse.Namespace) -> int:
    import tempfile

    from ..cli import main

    run = locate_run(options.run, options.root)
    status = look_at(run)
    if status.is_active:
        raise PreflightError(f"run {status.run_id} is {_described(status)}; it needs no resume")
    if gather(run).is_command:
        raise ConfigError(
            "RUN",
            options.run,
            "is a command, and has no settings to go on with",
            fix=f"anemoi-dist submit launcher=slurm run.id={run.run_id} ... -- COMMAND again",
        )
    for text in options.overrides:
        if _names(text, "run", "run.id", "run.root"):
            raise ConfigError("resume", text, "cannot name another run", fix="anemoi-dist train run.id=... for that")
    given = any(_names(text, "training.max_steps") for text in options.overrides)
    if status.state == "finished" and not given and _is_all_done(run):
        print(
            f"run {status.run_id} is {_described(status)}; to train on: "
            f"anemoi-dist resume {status.run_id} training.max_steps=N"
        )
        return ExitCode.FINISHED
    with tempfile.TemporaryDirectory(prefix="anemoi-dist-") as folder:
        file, kind = _frozen(run, options.overrides, Path(folder))
        command = "submit" if kind == "slurm" else "train"
        # The same entrance as the first time, with the frozen configuration laid over the defaults.
        dry_run = ["--dry-run"] if options.dry_run else []
        return main([command, "--config", str(file), *dry_run, *options.overrides])


def _is_all_done(run: RunDirectory) -> bool:
    """Whether the frozen configuration asks for no more steps than were done."""
    from anemoi_dist.config.tree import find, read_yaml
    from anemoi_dist.run.attempt import is_finished

    asked = find(read_yaml(run.config_file), "training.max_steps")[1]
    return isinstance(asked, int) and is_finished(run, max_steps=asked)


def _names(override: str, *keys: str) -> bool:
    return override.lstrip("+~").partition("=")[0] in keys


def _frozen(run: RunDirectory, overrides: list[str], folder: Path) -> tuple[Path, str]:
    """Return the frozen configuration as a file, less the groups that the user chooses anew, and ``launcher.kind``.

    A file lies over the groups: with its ``engine`` in it, ``engine=zero1`` would change nothing.
    """
    from anemoi_dist.config.overrides import available_groups, parse_overrides
    from anemoi_dist.config.tree import find, read_yaml, remove

    content = read_yaml(run.config_file)
    chosen = parse_overrides(overrides, groups=available_groups()).choices
    for group in chosen:
        if find(content, group.replace("/", "."))[0]:
            remove(content, group.replace("/", "."))
    kind = chosen.get("launcher") or find(content, "launcher.kind")[1] or "local"
    # Where it lies now: it may have been moved, and run.root may be relative to where it was started.
    content["run"] = {**content.get("run", {}), "id": run.run_id, "root": str(run.path.parent)}
    return _written(content, folder / run.config_file.name), str(kind)


def _written(content: dict[str, Any], file: Path) -> Path:
    import yaml

    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file
