"""Other programs' checkpoints, converted to a committed checkpoint that ``train`` resumes from."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.checkpoint.importers.dcp import read_dcp
from anemoi_dist.checkpoint.importers.deepspeed import read_deepspeed
from anemoi_dist.checkpoint.importers.foreign import ForeignCheckpoint
from anemoi_dist.checkpoint.importers.torch_file import read_torch_file
from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.matching import FROM_ADAMW, renamed
from anemoi_dist.checkpoint.ranks import SingleRank
from anemoi_dist.checkpoint.saver import Saver
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import Folder, store_of
from anemoi_dist.config.schema import CheckpointConfig
from anemoi_dist.config.tree import is_below
from anemoi_dist.errors import AnemoiDistError, ConfigError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import owned
from anemoi_dist.run.versions import installed_versions

#: The reader of each format; ``lightning`` and ``torch`` are both files of torch.save.
READERS: dict[str, Callable[..., ForeignCheckpoint]] = {
    "lightning": read_torch_file,
    "torch": read_torch_file,
    "deepspeed": read_deepspeed,
    "dcp": read_dcp,
}


@dataclass
class Imported:
    """The result of :func:`import_checkpoint`.

    Attributes
    ----------
    folder : Folder
        The committed checkpoint.
    format : str
        The format that was found.
    step : int
        Optimizer steps done.
    notes : list[str]
        What the user should know.
    """

    folder: Folder
    format: str
    step: int
    notes: list[str] = field(default_factory=list)


def detect(source: Path) -> str:
    """Return the format of a file or directory by what it looks like; a file is told apart when it is read."""
    if source.is_file():
        return "torch"
    if (source / ".metadata").is_file():
        return "dcp"
    if (source / "latest").is_file() or list(source.glob("*_optim_states.pt")):
        return "deepspeed"
    raise ConfigError(
        "SOURCE", str(source), "is no file of torch.save, no DCP directory and no DeepSpeed directory", valid=READERS
    )


def import_checkpoint(
    source: Path,
    run: RunDirectory,
    *,
    format: str | None = None,
    step: int | None = None,
    rename: Mapping[str, str] | None = None,
    weights_only: bool = False,
    keep_adamw: bool = False,
    trust_pickle: bool = False,
) -> Imported:
    """Read a foreign checkpoint and commit it as one of ``run``.

    Parameters
    ----------
    source : Path
        A file of torch.save, or a directory of DeepSpeed or DCP.
    run : RunDirectory
        Created where it does not exist.
    format : str, optional
        One of ``READERS``; by default what it looks like.
    step : int, optional
        Optimizer steps done, where the source does not say, or says otherwise.
    rename : Mapping[str, str], optional
        As in :func:`anemoi_dist.checkpoint.matching.renamed`.
    weights_only : bool, optional
        Leave the optimizer's states.
    keep_adamw : bool, optional
        Keep AdamW's names, to continue with AdamW; otherwise they become AdEMAMix's.
    trust_pickle : bool, optional
        Build every object of a pickle, which may run any code.

    Raises
    ------
    ConfigError
        The source cannot be read, or the run has a checkpoint that would be newer.
    PreflightError
        The run is running.
    """
    if not source.exists():
        raise ConfigError("SOURCE", str(source), "does not exist")
    foreign = _read(source, format or detect(source), trust=trust_pickle, weights_only=weights_only)
    shards = _named(list(map(_widened, foreign.shards)), rename or {})
    step = _step(step, foreign.step, shards)
    notes: list[str] = []
    kinds = {shard.kind for shard in shards} - {"param", "buffer"}
    if not keep_adamw and "exp_avg" in kinds and kinds <= {*FROM_ADAMW}:
        shards = [replace(shard, kind=FROM_ADAMW.get(shard.kind, shard.kind)) for shard in shards]
        notes.append(
            f"AdamW's EMA states are AdEMAMix's fast ones now, the slow one begins at zero: continue with "
            f"++training.optimizer.schedule_start={step}, so that alpha and beta3 warm up from here"
        )
    run.create()
    return Imported(_commit(run, shards, step=step, format=foreign.format), foreign.format, step, notes)


def _commit(run: RunDirectory, shards: list[Shard], *, step: int, format: str) -> Folder:
    """Save the shards as a checkpoint of a run that is not running and has no newer one."""
    with owned(run):
        store = store_of(run)
        if newer := [known for known in store.steps() if known >= step]:
            raise ConfigError(
                "--run", run.run_id, f"has a checkpoint of step {newer[0]}, not before step {step}", fix="another run"
            )
        saver = Saver(
            store,
            world=SingleRank(),
            config=CheckpointConfig(asynchronous=False, on_error="stop", read_back=False, keep_last=None),
            origin=Origin(
                engine=f"{format} import", config_hash="", versions=installed_versions("anemoi-dist", "torch")
            ),
        )
        progress = {"step": step, "num_skipped_in_row": 0}
        saver.save(step, lambda: shards, samples_seen=0, trainer={"progress": progress})
    return store.path(step)


def _read(source: Path, format: str, *, trust: bool, weights_only: bool) -> ForeignCheckpoint:
    try:
        return READERS[format](source, trust=trust, weights_only=weights_only)
    except AnemoiDistError:
        raise
    except Exception as error:  # sizes, offsets and layouts are whatever the file says
        rule = f"is not laid out as a {format} checkpoint: {error!r}"
        raise ConfigError("SOURCE", str(source), rule, valid=READERS) from error


def _widened(shard: Shard) -> Shard:
    """Return parameters and EMA states of 16 bits in float32, as masters are kept; that loses nothing."""
    if shard.kind != "buffer" and shard.tensor.dtype in (torch.bfloat16, torch.float16):
        return replace(shard, tensor=shard.tensor.float())
    return shard


def _named(shards: list[Shard], rename: Mapping[str, str]) -> list[Shard]:
    """Take away a ``module.`` before every name, which wrappers put there, then rename."""
    # Only if every name has it: a model may have a submodule of that name, among others.
    wrapped = all(shard.fqn.startswith("module.") for shard in shards)
    plain = {shard.fqn: shard.fqn.removeprefix("module.") if wrapped else shard.fqn for shard in shards}
    for old in rename:
        if old and not any(is_below(name, (old,)) for name in plain.values()):
            raise ConfigError("--rename", old, "is the name of nothing in the source", valid=_near(old, plain.values()))
    # Two tensors under one name would become one with overlapping ranges, which the manifest refuses much later.
    taken: dict[str, str] = {}
    for name in plain.values():
        new = renamed(name, rename)
        if taken.setdefault(new, name) != name:
            raise ConfigError("--rename", new, f"would be the name of both {taken[new]} and {name}")
    return [replace(shard, fqn=renamed(plain[shard.fqn], rename)) for shard in shards]


def _near(name: str, names: Iterable[str]) -> list[str]:
    """Return the names and prefixes most like ``name``, or what all names begin with."""
    prefixes = {".".join(parts[:end]) for parts in (n.split(".") for n in names) for end in range(1, len(parts) + 1)}
    near = difflib.get_close_matches(name, sorted(prefixes), n=5)
    return near or sorted({prefix for prefix in prefixes if "." not in prefix})


def _step(given: int | None, said: Any, shards: list[Shard]) -> int:
    """Return the step: what the user gives, what the source says, or the furthest counter."""
    counters = [float(shard.tensor) for shard in shards if shard.kind == "step" and shard.tensor.numel() == 1]
    step = next((x for x in (given, said, max(counters, default=None)) if x is not None), None)
    if step is None:
        raise ConfigError("--step", None, "the source does not say how many optimizer steps were done", fix="--step N")
    # float counts to 2^53; true is 1 to Python.
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step <= 2**53 or step != int(step):
        raise ConfigError("--step", step, "is no number of optimizer steps", fix="--step N")
    return int(step)
