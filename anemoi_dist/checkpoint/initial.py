"""The checkpoint that a new run begins with (``checkpoint.init_from``). No torch."""

from __future__ import annotations

from pathlib import Path

from anemoi_dist.checkpoint.store import parse_name, store_of
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import CheckpointError, ConfigError
from anemoi_dist.run.directory import RunDirectory

KEY = "checkpoint.init_from"


def find_initial(name: str, *, root: str) -> Path:
    """Return the directory of the checkpoint that ``checkpoint.init_from`` names.

    Parameters
    ----------
    name : str
        ``RUN`` or ``RUN@STEP``, where RUN is an id below ``root`` or the path of a run's directory, or the directory of
        a checkpoint. Of a run alone it is the newest checkpoint with a valid manifest.
    root : str
        ``run.root``.

    Raises
    ------
    ConfigError
        There is no such run or checkpoint.
    """
    named, run_name, step = parse_name(name)
    reasons = []
    for folder in [named] if named is not None else _of_run(name, run_name, step, root=root):
        try:
            SavedCheckpoint(folder)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return folder
    raise ConfigError(KEY, name, f"holds no whole checkpoint: {'; '.join(reasons) or 'nothing is saved there'}")


def _of_run(name: str, run_name: str, step: int | None, *, root: str) -> list[Path]:
    """Return the checkpoints of a run, newest first, or the one of a step."""
    run = RunDirectory(Path(run_name).absolute()) if "/" in run_name else RunDirectory.locate(root, run_name)
    if not run.path.is_dir():
        known = sorted(path.parent.name for path in run.path.parent.glob("*/config.yaml"))
        raise ConfigError(KEY, name, f"is neither a run ({run.path} is missing) nor a checkpoint", valid=known[:20])
    store = store_of(run)
    steps = [found for found in store.steps() if step in (None, found)]
    if step is not None and not steps:
        valid = [f"{run_name}@{found}" for found in store.steps()]
        raise ConfigError(KEY, name, "is not a checkpoint of the run", valid=valid)
    folders = [store.path(found) for found in steps]
    if not all(isinstance(folder, Path) for folder in folders):
        fix = "`anemoi-dist checkpoint export` and a run beside it"
        raise ConfigError(KEY, name, "keeps its checkpoints in another store (checkpoint.url)", fix=fix)
    return [folder for folder in folders if isinstance(folder, Path)]
