"""Paths of a run, and atomic writing of its small files. No torch: both sides use it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anemoi_dist.config.identity import check_run_id
from anemoi_dist.errors import PreflightError
from anemoi_dist.run.records import STATES, RunState, from_json, to_json

#: Environment variable of ranks: the kind of the launcher that owns the run.
LAUNCHED = "ANEMOI_DIST_LAUNCHED"
#: Room for ``run.json`` of hundreds of attempts beside its old version.
_RESERVE_BYTES = 256 * 1024


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable: without it a renamed file can vanish in a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of ``path`` so that a reader sees the old or the new one, also after a power cut."""
    # In the same directory, since a rename is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # The rename itself is durable only with its directory.
    fsync_directory(path.parent)


@dataclass(frozen=True)
class RunDirectory:
    """The layout of ``<run.root>/<run.id>/``.

    Parameters
    ----------
    path : Path
        The run's directory. It need not exist yet.
    """

    path: Path

    @classmethod
    def locate(cls, root: str | Path, run_id: str) -> RunDirectory:
        """Return the directory of ``run_id`` below ``root`` without creating it."""
        return cls(Path(root).expanduser().absolute() / check_run_id(run_id))

    @property
    def run_id(self) -> str:
        """Name of the run, and of its directory."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The frozen configuration that every rank reads."""
        return self.path / "config.yaml"

    @property
    def state_file(self) -> Path:
        """``run.json``: state, attempts, owner."""
        return self.path / "run.json"

    @property
    def reserve_file(self) -> Path:
        """Space that the end of an attempt takes on a full disk."""
        return self.path / ".reserve"

    @property
    def lock_file(self) -> Path:
        """Locked by rank 0 while it runs."""
        return self.path / "lock"

    @property
    def events_file(self) -> Path:
        """One JSON object a line, appended to by rank 0."""
        return self.path / "events.jsonl"

    @property
    def launch_file(self) -> Path:
        """One JSON object a line, appended to by the control side: submissions, starts, restarts, requeues, ends."""
        return self.path / "launch.jsonl"

    @property
    def launch_lock_file(self) -> Path:
        """Locked by the launcher from before it prepares the run until its ranks have ended."""
        return self.path / "launch.lock"

    @property
    def scripts_dir(self) -> Path:
        """The batch scripts that were submitted."""
        return self.path / "scripts"

    @property
    def slurm_logs_dir(self) -> Path:
        """Output of SLURM's batch scripts, ``slurm-<job id>.log``."""
        return self.path / "logs"

    @property
    def control_dir(self) -> Path:
        """Stop requests are files in here."""
        return self.path / "control"

    @property
    def stop_file(self) -> Path:
        """Its existence asks the run to save and stop."""
        return self.control_dir / "stop"

    def rendezvous_file(self, key: str) -> Path:
        """Return the file with the address of rank 0, for the start of the ranks that ``key`` names."""
        return self.control_dir / f"rendezvous-{key}.json"

    @property
    def foreign_checkpoint_file(self) -> Path:
        """Path of the checkpoint that anemoi-training's own trainer continues from."""
        return self.control_dir / "last-checkpoint"

    @property
    def heartbeats_dir(self) -> Path:
        """One heartbeat file a rank."""
        return self.path / "heartbeats"

    @property
    def checkpoints_dir(self) -> Path:
        """Committed checkpoints, and ``.tmp`` directories of uncommitted ones."""
        return self.path / "checkpoints"

    @property
    def inference_file(self) -> Path:
        """The file that anemoi-inference loads, of the end of the run."""
        return self.path / "inference.ckpt"

    @property
    def inference_dir(self) -> Path:
        """The same of each kept checkpoint, with its name; not made before there is one."""
        return self.path / "inference"

    @property
    def metrics_dir(self) -> Path:
        """Files of TensorBoard."""
        return self.path / "metrics"

    @property
    def mlflow_file(self) -> Path:
        """Ids of the MLflow runs that this run continues, by tracking URI."""
        return self.path / "mlflow.json"

    @property
    def report_dir(self) -> Path:
        """The HTML report and the arrays that it shows."""
        return self.path / "report"

    def logs_dir(self, attempt: int) -> Path:
        """Return the directory of the log files of one attempt, counted from 1."""
        return self.path / "logs" / f"attempt-{attempt:02d}"

    def log_file(self, attempt: int, rank: int) -> Path:
        """Return the log file of one rank in one attempt."""
        return self.logs_dir(attempt) / f"rank-{rank:05d}.log"

    def heartbeat_file(self, rank: int) -> Path:
        """Return the heartbeat file of one rank."""
        return self.heartbeats_dir / f"rank-{rank:05d}.json"

    def create(self) -> None:
        """Create the directory and its folders, private to the user (mode 0700); existing ones are kept."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (
            self.path,
            self.control_dir,
            self.heartbeats_dir,
            self.checkpoints_dir,
            self.metrics_dir,
            self.report_dir,
        ):
            folder.mkdir(mode=0o700, exist_ok=True)

    def read_state(self) -> RunState:
        """Return ``run.json``, or the state of a run that was never started.

        Raises
        ------
        PreflightError
            The file is damaged.
        """
        try:
            content = json.loads(self.state_file.read_text(encoding="utf-8"))
            if not isinstance(content["attempts"], list) or content["state"] not in STATES:
                raise ValueError("its state or its attempts make no sense")
        except FileNotFoundError:
            return RunState()
        except (ValueError, TypeError, KeyError) as error:
            raise PreflightError(
                f"{self.state_file} is damaged ({error!r}); move it away: the run continues from its checkpoints"
            ) from error
        state = from_json(RunState, content)
        for number, attempt in enumerate(state.attempts, start=1):
            attempt.number = number
        return state

    @contextlib.contextmanager
    def changing_state(self) -> Iterator[RunState]:
        """Yield the content of ``run.json`` for changes and write it back, excluding other processes meanwhile."""
        # A lock file of its own: run.json is replaced with each write, and a lock on it would go with the old inode.
        with (self.path / ".run.json.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.read_state()
            before = json.dumps(to_json(state))
            yield state
            if json.dumps(to_json(state)) != before:
                self.write_state(state)

    def write_state(self, state: RunState) -> None:
        """Write ``run.json`` atomically, on a full disk into what :meth:`reserve_space` holds."""
        if state.state not in STATES:
            raise ValueError(f"state {state.state!r} is not one of {', '.join(STATES)}")
        text = json.dumps(to_json(state), indent=2) + "\n"
        try:
            write_atomically(self.state_file, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.reserve_file.exists():
                raise
            self.release_space()
            write_atomically(self.state_file, text)

    def reserve_space(self) -> None:
        """Take a little of the disk while there is room, so that the end of an attempt can be recorded without."""
        try:
            with self.reserve_file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, _RESERVE_BYTES)
        except OSError:  # full already, or a file system that cannot promise space
            self.release_space()

    def release_space(self) -> None:
        """Give back what :meth:`reserve_space` has taken."""
        with contextlib.suppress(OSError):
            self.reserve_file.unlink(missing_ok=True)
