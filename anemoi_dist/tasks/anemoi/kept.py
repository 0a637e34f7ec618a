"""Inference files of a run's kept checkpoints, each written by a process of its own while training goes on.

``python -m anemoi_dist.tasks.anemoi.kept RUN STEP FILE`` writes one of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from anemoi_dist.checkpoint.store import Store, open_store, store_of
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.checkpoint.worker import Job, Worker
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.errors import AnemoiDistError
from anemoi_dist.process.parent_death import PARENT_PID
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.anemoi.inference import export_inference
from anemoi_dist.telemetry.heartbeat import beat

_FILE = re.compile(r"step-(\d{8,})\.ckpt")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.ckpt\..*\.tmp")
#: Lines of a failed process that are shown: an error of ours has at most so many.
_LINES_SHOWN = 4


class KeptFiles:
    """Makes ``<run>/inference`` hold a file for each checkpoint of the run, and no other. On rank 0.

    What is missing is found by looking, so that what a kill, a stop or a full disk left out is written after a later
    save. A process of its own writes: building a model draws from the random streams of this one, and takes seconds.

    Parameters
    ----------
    run : RunDirectory
        The run; its configuration is frozen.
    config : Config
        ``checkpoint.url`` and ``watchdog``, whose longer limit bounds the writing of one file, are used.
    """

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self._run, self._url, self._timeout_s = run, config.checkpoint.url, config.watchdog.longest_s
        self._worker = Worker()
        self._jobs: list[Job] = []
        self._failed: set[int] = set()
        self._messages: list[str] = []

    def update(self, *, saved: int | None = None) -> None:
        """Begin to write and to delete what is missing or left over; ``saved`` has just been saved, perhaps again."""
        self._jobs.append(self._worker.submit(lambda: self._bring_up_to_date(saved)))

    def wait(self) -> None:
        """Wait until everything that was begun is done."""
        for job in self._jobs:
            job.wait()

    def messages(self) -> list[str]:
        """Return what has failed since the last call."""
        done = [job for job in self._jobs if job.is_done]
        self._jobs = [job for job in self._jobs if job not in done]
        told, self._messages = self._messages, []
        return told + [f"{self._run.inference_dir} is not up to date: {job.error}" for job in done if job.error]

    # In the thread

    def _bring_up_to_date(self, saved: int | None) -> str:
        folder, store = self._run.inference_dir, open_store(self._run, self._url)
        folder.mkdir(mode=0o700, exist_ok=True)
        if saved is not None:  # what is there is of another training that came to this step
            (folder / f"step-{saved:08d}.ckpt").unlink(missing_ok=True)
            self._failed.discard(saved)
        while True:
            steps = store.steps()
            written = _tidy(folder, steps)
            # The newest first: retention deletes the oldest, perhaps before its turn comes.
            step = next((s for s in steps if s not in written and s not in self._failed), None)
            if step is None:
                return ""
            self._write(step, folder / f"step-{step:08d}.ckpt", store)

    def _write(self, step: int, out: Path, store: Store) -> None:
        said = self._run_process([str(self._run.path), str(step), str(out)])
        if said is None:
            return
        self._failed.add(step)
        if step in store.steps():  # else it has been deleted meanwhile, and nothing is missing
            self._messages.append(f"warning: {out} was not written: {said}")

    def _run_process(self, arguments: list[str]) -> str | None:
        """Run the module; return what it says if it fails."""
        command = [sys.executable, "-m", "anemoi_dist.process.parent_death", sys.executable, "-m", __name__, *arguments]
        # No GPU: memory there belongs to training.
        environment = {**os.environ, PARENT_PID: str(os.getpid()), "CUDA_VISIBLE_DEVICES": ""}
        begun = time.monotonic()
        # A session of its own: a signal to the ranks asks them to save, and would kill it.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        while True:
            try:
                _, said = process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:
                beat()  # the end of the run waits for this thread
                if self._timeout_s is not None and time.monotonic() - begun > self._timeout_s:
                    process.kill()
            else:
                break
        if process.returncode == 0:
            return None
        return "\n".join(said.splitlines()[-_LINES_SHOWN:]) or f"its process ended with code {process.returncode}"


def _tidy(folder: Path, steps: list[int]) -> set[int]:
    """Delete files of checkpoints that are gone, and what killed processes left; return the steps that have a file."""
    written = set()
    for entry in folder.iterdir():
        match = _FILE.fullmatch(entry.name)
        if _TEMPORARY.fullmatch(entry.name) or (match and int(match[1]) not in steps):
            entry.unlink(missing_ok=True)
        elif match:
            written.add(int(match[1]))
    return written


def main(arguments: list[str]) -> None:
    """Write the inference file of one checkpoint."""
    os.nice(10)  # training goes first
    run, step, out = RunDirectory(Path(arguments[0])), int(arguments[1]), Path(arguments[2])
    try:
        write_inference(run, step, out, config=from_yaml(run.config_file.read_text(encoding="utf-8")))
    except (AnemoiDistError, OSError) as error:
        sys.exit(str(error))


def write_inference(run: RunDirectory, step: int, out: Path, *, config: Config) -> None:
    """Write one file of a run's own, of the averaged weights where the run keeps an average."""
    averaged = config.training.weight_averaging.decay is not None
    checkpoint = SavedCheckpoint(store_of(run).path(step))
    export_inference(checkpoint, out, config=config, averaged=averaged, force=True)


if __name__ == "__main__":
    main(sys.argv[1:])
