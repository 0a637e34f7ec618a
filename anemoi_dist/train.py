"""What runs on every rank: ``torchrun ... -m anemoi_dist.train key=value ...``."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.compose import compose
from anemoi_dist.config.identity import changes_table
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.distributed.rendezvous import Meeting, meet
from anemoi_dist.errors import AnemoiDistError, ExitCode, PreflightError, print_error
from anemoi_dist.process.parent_death import die_with_parent, parent_in_environment
from anemoi_dist.run.attempt import Attempt, is_finished, record_end
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.lock import Hold, hold_launch
from anemoi_dist.run.prepare import claim_run
from anemoi_dist.run.records import Failure

if TYPE_CHECKING:
    from anemoi_dist.distributed.world import World

#: Of an error, its end says what happened; ``run.json`` is read by every command that lists runs.
_MAX_ERROR_CHARS = 8000


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train on this rank and exit with the code that says how it ended."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # before the imports that take seconds: the agent may be killed meanwhile
        die_with_parent(parent_pid=parent_in_environment())
    arguments = _parse(argv)
    run, hold = None, None
    try:
        meeting = meet(arguments.run_directory)
        if os.environ.get("RANK", "0") == "0":
            # Rank 0 alone composes, before any process group or device exists: a wrong key costs nobody anything.
            run, hold = _prepare(arguments)
            if hold is not None:
                run.stop_file.unlink(missing_ok=True)  # asked of an earlier start that did not live to answer
    except AnemoiDistError as error:
        print_error(error)
        sys.exit(error.exit_code)
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
    """Return the run and, where no launcher owns it, the ownership of this process."""
    if arguments.run_directory is not None:
        run = RunDirectory(arguments.run_directory.absolute())
        return run, None if LAUNCHED in os.environ else hold_launch(run, say=print)
    composed = compose(arguments.overrides, config_file=arguments.config, config_dir=arguments.config_dir)
    for message in composed.messages:
        print(message, flush=True)  # noqa: T201
    plan_batches(composed.config.training, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    return claim_run(composed.config)


def _train(run: RunDirectory | None, meeting: Meeting) -> ExitCode:
    """Join, agree on the run, train it, record how it ended."""
    from anemoi_dist.distributed.world import World
    from anemoi_dist.preflight.ranks import run_preflight
    from anemoi_dist.telemetry.console import keep_log
    from anemoi_dist.telemetry.watchdog import watch
    from anemoi_dist.training.setup import train

    attempt, number, failure = None, 0, None
    try:
        with meeting:
            world = World.join()
        if world.is_main:
            assert run is not None, "rank 0 has prepared the run"
            attempt, agreed = _begin(run, world)
        agreed = json.loads(world.broadcast_text(json.dumps(agreed) if world.is_main else None))
        if "exit_code" in agreed:  # rank 0 has said why
            world.leave()
            return ExitCode(agreed["exit_code"])
        run, number = RunDirectory(Path(agreed["path"])), agreed["attempt"]
        (keep_log if world.is_main else _redirect)(run.log_file(number, world.rank))
        config = from_yaml(_read_frozen(run, agreed["config"]))
        with watch(
            run,
            attempt=number,
            rank=world.rank,
            world_size=world.world_size,
            timeout_s=config.watchdog.timeout_s,
            num_collectives=world.num_collectives,
        ):
            if config.launcher.preflight:
                run_preflight(world, run.path.parent)
            train(config, run=run, world=world, attempt=number)
            code = ExitCode.FINISHED
            world.leave()
    except AnemoiDistError as error:
        print_error(error)
        code, failure = error.exit_code, str(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception:
        code, failure = ExitCode.INTERNAL, traceback.format_exc()
        print(failure, file=sys.stderr, flush=True)  # noqa: T201
    told = _failure(run, number, failure) if run is not None and failure and code != ExitCode.SAVED_RUN_AGAIN else None
    try:
        if attempt is not None:
            return attempt.end(code, failure=told)
        if run is not None and number and told is not None:  # perhaps known to this rank alone
            return record_end(run, number, code, failure=told)
    except OSError as error:  # a full disk: the code itself still says how it ended
        print(f"the end of the attempt cannot be recorded: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return code


def _failure(run: RunDirectory, number: int, error: str) -> Failure:
    """Return the record that this rank failed."""
    rank = int(os.environ.get("RANK", "0"))
    log = str(run.log_file(number, rank))
    return Failure(rank, host=socket.gethostname(), pid=os.getpid(), error=error[-_MAX_ERROR_CHARS:], log=log)


def _begin(run: RunDirectory, world: World) -> tuple[Attempt | None, dict[str, object]]:
    """Take hold of the run; what rank 0 found goes to the others."""
    try:
        text = run.config_file.read_text(encoding="utf-8")
        config = from_yaml(text)
        if is_finished(run, max_steps=config.training.max_steps):
            print(  # noqa: T201
                f"run {run.run_id} is finished (training.max_steps={config.training.max_steps}); to train on, give "
                f"run.id={run.run_id} and a larger training.max_steps",
                flush=True,
            )
            return None, {"exit_code": ExitCode.FINISHED}
        attempt = Attempt(run, world_size=world.world_size, max_steps=config.training.max_steps)
        if attempt.changes:
            table = changes_table(attempt.changes)
            print(f"differs from the last start of run {run.run_id}:\n{table}", flush=True)  # noqa: T201
        return attempt, {"path": str(run.path), "attempt": attempt.number, "config": text}
    except AnemoiDistError as error:
        print_error(error)
        return None, {"exit_code": error.exit_code}


def _read_frozen(run: RunDirectory, expected: str) -> str:
    """Read the configuration from the run directory, as every rank must be able to."""
    try:
        text = run.config_file.read_text(encoding="utf-8")
    except OSError as error:
        text = f"{error}"
    if text != expected:
        raise PreflightError(
            f"{run.config_file} is not what rank 0 sees: run.root must lie on a file system that all nodes share"
        )
    return text


def _redirect(log: Path) -> None:
    """Send this rank's output to its own file; the terminal is rank 0's."""
    stream = log.open("a", buffering=1, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)


def _exit(code: ExitCode, meeting: Meeting) -> NoReturn:
    """Leave. After a failure at once: other ranks may be gone, and a clean-up that talks to them would hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == ExitCode.FINISHED:
        sys.exit(code)
    is_main = os.environ.get("RANK", "0") == "0"
    if code == ExitCode.SAVED_RUN_AGAIN and meeting.kills_others and (not is_main or LAUNCHED in os.environ):
        os._exit(0)  # with its own code the first to leave would end rank 0 before that has recorded the end
    os._exit(code)


if __name__ == "__main__":
    main()
