"""Entry point of every rank: ``torchrun ... -m anemoi_dist.train key=value ...``."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.compose import compose
from anemoi_dist.config.identity import changes_table
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.distributed.rendezvous import Meeting, meet
from anemoi_dist.errors import AnemoiDistError, ExitCode, PreflightError, print_error, print_message
from anemoi_dist.process.output import protect_output
from anemoi_dist.process.parent_death import die_with_parent, parent_in_environment
from anemoi_dist.run.attempt import Attempt, is_finished, leave_ending, record_end
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.lock import Hold, hold_launch
from anemoi_dist.run.prepare import claim_run
from anemoi_dist.run.records import Failure

if TYPE_CHECKING:
    from anemoi_dist.distributed.world import World

#: The end of a traceback says what happened; ``run.json`` stays small, since every command that lists runs reads it.
_MAX_ERROR_CHARS = 8000


@dataclass(frozen=True)
class _Agreement:
    """Message of rank 0 to the others: the run and its configuration, or the code to end with."""

    path: str = ""
    attempt: int = 0
    config: str = ""
    exit_code: int | None = None


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train on this rank and exit with the code that says how it ended."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # before the imports that take seconds: the agent may be killed meanwhile
        die_with_parent(parent_pid=parent_in_environment())
    protect_output()
    arguments = _parse(argv)
    run, hold = None, None
    try:
        meeting = meet(arguments.run_directory)
        if os.environ.get("RANK", "0") == "0":
            # Rank 0 alone composes, before any process group or device exists: a wrong key must cost no GPU time, and
            # no rank may end up with another configuration.
            run, hold = _prepare(arguments)
            if hold is not None:
                run.stop_file.unlink(missing_ok=True)  # meant for an earlier start that ended before it saw the file
    except AnemoiDistError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk before anything could be recorded: another try would not help
        print_error(error)
        sys.exit(ExitCode.PREFLIGHT)
    code = _train(run, meeting)
    if hold is not None:
        hold.release()
    _exit(code, meeting)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m anemoi_dist.train", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, in Hydra's grammar")
    parser.add_argument("--config", type=Path, help="a YAML file laid over the defaults")
    parser.add_argument("--config-dir", type=Path, help="a folder with further configuration groups")
    parser.add_argument("--run-directory", type=Path, help="a run that is already prepared; excludes key=value")
    return parser.parse_args(argv)


def _prepare(arguments: argparse.Namespace) -> tuple[RunDirectory, Hold | None]:
    """Return the run, and this process's hold on it unless a launcher has one."""
    if arguments.run_directory is not None:
        run = RunDirectory(arguments.run_directory.absolute())
        return run, None if LAUNCHED in os.environ else hold_launch(run, say=print)
    composed = compose(arguments.overrides, config_file=arguments.config, config_dir=arguments.config_dir)
    for message in composed.messages:
        print(message, flush=True)  # noqa: T201
    plan_batches(composed.config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    return claim_run(composed.config)


def _train(run: RunDirectory | None, meeting: Meeting) -> ExitCode:
    """Join the other ranks, agree on the run, train it and record how it ended."""
    if run is not None:
        # Importing torch from a cold file system may take minutes, in which nothing else is printed.
        print("loading libraries", flush=True)  # noqa: T201
    # Imported here: these load torch, which takes seconds; until now a wrong key cost none of them.
    from anemoi_dist.distributed.world import World
    from anemoi_dist.preflight.ranks import run_preflight
    from anemoi_dist.telemetry.console import keep_log, print_warnings_plainly, redirect_to_log
    from anemoi_dist.telemetry.watchdog import watch
    from anemoi_dist.training.setup import train

    print_warnings_plainly()
    attempt, number, error_text = None, 0, None
    try:
        with meeting:
            world = World.join()
        own = None
        if world.is_main:
            assert run is not None, "rank 0 has prepared the run"
            attempt, own = _begin(run, world)
        # Every rank reaches this broadcast, also after a failure on rank 0: the others would wait for it for ever.
        agreed = _Agreement(**json.loads(world.broadcast_text(None if own is None else json.dumps(asdict(own)))))
        if agreed.exit_code is not None:  # rank 0 has printed the reason
            world.leave()
            return ExitCode(agreed.exit_code)
        run, number = RunDirectory(Path(agreed.path)), agreed.attempt
        (keep_log if world.is_main else redirect_to_log)(run.log_file(number, world.rank))
        config = from_yaml(_read_frozen(run, agreed.config))
        with watch(
            run,
            attempt=number,
            rank=world.rank,
            world_size=world.world_size,
            timeout_s=config.watchdog.timeout_s,
            startup_timeout_s=config.watchdog.startup_s,
            num_collectives=world.num_collectives,
        ):
            if config.launcher.preflight:
                run_preflight(world, run.path.parent)
            train(config, run=run, world=world, attempt=number)
            code = ExitCode.FINISHED
            # Inside: a rank that hangs while it leaves is a hang too. After a failure there is no orderly shutdown:
            # destroying a process group would wait for ranks that may be gone.
            world.leave()
    except AnemoiDistError as error:
        print_error(error)
        code, error_text = error.exit_code, str(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception:
        code, error_text = ExitCode.INTERNAL, traceback.format_exc()
        print(error_text, file=sys.stderr, flush=True)  # noqa: T201
    failure = None
    if run is not None and error_text and code != ExitCode.SAVED_RUN_AGAIN:
        failure = _failure(run, number, error_text)
    return _record_end(run, number, code, attempt=attempt, failure=failure)


def _record_end(
    run: RunDirectory | None, number: int, code: ExitCode, *, attempt: Attempt | None, failure: Failure | None
) -> ExitCode:
    """Record how the attempt ended and return the code to exit with."""
    try:
        if attempt is not None:
            return attempt.end(code, failure=failure)
        # A failure of another rank may be known to that rank alone: rank 0 then only sees a broken connection.
        if run is not None and number and failure is not None:
            return record_end(run, number, code, failure=failure)
    except OSError as error:  # a full disk: the launcher records it as soon as that is possible
        leave_ending(number, code, failure=failure)
        print_message(f"the end of the attempt cannot be recorded: {error}")
    return code


def _failure(run: RunDirectory, number: int, error: str) -> Failure:
    """Return the record of this rank's failure."""
    rank = int(os.environ.get("RANK", "0"))
    log = str(run.log_file(number, rank))
    return Failure(rank, host=socket.gethostname(), pid=os.getpid(), error=error[-_MAX_ERROR_CHARS:], log=log)


def _begin(run: RunDirectory, world: World) -> tuple[Attempt | None, _Agreement]:
    """Begin an attempt on rank 0; return it, and the message to the other ranks."""
    try:
        text = run.config_file.read_text(encoding="utf-8")
        config = from_yaml(text)
        if is_finished(run, max_steps=config.training.max_steps):
            print(  # noqa: T201
                f"run {run.run_id} is finished (training.max_steps={config.training.max_steps}); to train on, give "
                f"run.id={run.run_id} and a larger training.max_steps",
                flush=True,
            )
            return None, _Agreement(exit_code=ExitCode.FINISHED)
        attempt = Attempt(run, world_size=world.world_size, max_steps=config.training.max_steps)
        if attempt.changes:
            table = changes_table(attempt.changes)
            print(f"differs from the last start of run {run.run_id}:\n{table}", flush=True)  # noqa: T201
        return attempt, _Agreement(str(run.path), attempt.number, config=text)
    except AnemoiDistError as error:
        print_error(error)
        return None, _Agreement(exit_code=error.exit_code)
    except OSError as error:  # a disk on which not even the start can be recorded
        print_error(error)
        return None, _Agreement(exit_code=ExitCode.PREFLIGHT)


def _read_frozen(run: RunDirectory, expected: str) -> str:
    """Read the frozen configuration and compare it with that of rank 0.

    Raises
    ------
    PreflightError
        The run directory is not on a file system that all nodes share.
    """
    try:
        text = run.config_file.read_text(encoding="utf-8")
    except OSError as error:
        text = f"{error}"
    if text != expected:
        raise PreflightError(
            f"{run.config_file} is not what rank 0 sees: run.root must lie on a file system that all nodes share"
        )
    return text


def _exit(code: ExitCode, meeting: Meeting) -> NoReturn:
    """Exit. After a failure at once: other ranks may be gone, and a clean-up that talks to them would hang."""
    # os._exit flushes nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    if code == ExitCode.FINISHED:
        sys.exit(code)
    is_main = os.environ.get("RANK", "0") == "0"
    if code == ExitCode.SAVED_RUN_AGAIN and meeting.kills_others and (not is_main or LAUNCHED in os.environ):
        # A launcher such as torchrun ends all ranks as soon as one leaves with another code than 0, and rank 0 has not
        # recorded the end yet.
        os._exit(0)
    os._exit(code)


if __name__ == "__main__":
    main()
