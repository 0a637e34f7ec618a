"""Matching of a checkpoint to a model by names: one report of everything that differs, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from anemoi_dist.checkpoint.manifest import AVERAGE
from anemoi_dist.checkpoint.shard import ShardSource, TensorInfo
from anemoi_dist.config.tree import is_below
from anemoi_dist.errors import CheckpointError

Key = tuple[str, str]

#: AdamW's EMA states by AdEMAMix's names; the slow one is not among them and begins at zero.
FROM_ADAMW = {"exp_avg": "exp_avg_fast", "exp_avg_sq": "exp_avg_sq", "step": "step"}
#: The other way; the slow EMA is not taken along.
TO_ADAMW = {new: old for old, new in FROM_ADAMW.items()} | {"exp_avg_slow": "exp_avg_slow"}

_KINDS = {"param": "parameter", "buffer": "buffer"}
#: Names for which the nearest is looked up: each is compared with all names, and a different model has thousands.
_NUM_NEAREST = 20


def renamed(name: str, rename: Mapping[str, str]) -> str:
    """Return the name that ``rename`` gives to ``name``; the longest entry that fits counts.

    Parameters
    ----------
    name : str
        Of a parameter or buffer.
    rename : Mapping[str, str]
        Old name, or prefix that ends before a dot, to new. An empty old name is before every name, an empty new one
        takes the prefix away.
    """
    for old in sorted(rename, key=len, reverse=True):
        if name == old:
            return rename[old]
        if not old or is_below(name, (old,)):
            rest = name[len(old) :].lstrip(".")
            return f"{rename[old]}.{rest}" if rename[old] else rest
    return name


class MatchedSource:
    """A source under the names of a model, restricted to the tensors that match it.

    Parameters
    ----------
    source : ShardSource
        The checkpoint.
    names : Mapping[Key, Key]
        ``(fqn, kind)`` in the model -> in the checkpoint, the optimizer's states included.
    missing, unused : Sequence[str]
        Names that only the model has, and names that only the checkpoint has.
    """

    def __init__(
        self, source: ShardSource, names: Mapping[Key, Key], *, missing: Sequence[str], unused: Sequence[str]
    ) -> None:
        self._source, self._names, self.missing, self.unused = source, names, missing, unused
        self._state_notes: list[str] = []
        # Kept: an engine asks for them at every shard, and a checkpoint builds them on each call.
        available = source.tensors()
        self._tensors = {ours: available[theirs] for ours, theirs in names.items()}

    def select_states(
        self, known: Collection[str], rename: Mapping[str, str], *, required: Collection[str] = ()
    ) -> None:
        """Keep the states that the optimizer knows, and rename those of another optimizer that ``rename`` covers.

        Parameters
        ----------
        known : Collection[str]
            The optimizer's names.
        rename : Mapping[str, str]
            Another optimizer's state names -> this one's; used only if the checkpoint has no states but these.
        required : Collection[str]
            Names without which the optimizer cannot go on, and takes no state at all.
        """
        saved = {kind for _, kind in self._names} - {*_KINDS, AVERAGE}
        renames = {old: new for old, new in rename.items() if old != new and old in saved and new in known}
        # With any other state the checkpoint comes from an unknown optimizer, whose exp_avg_sq may mean something else.
        if not saved <= rename.keys():
            renames = {}
        dropped = sorted(saved - {*known} - renames.keys())
        if missing := {*required} - saved - {*renames.values()}:
            renames, dropped = {}, sorted(saved)
        self._names = {
            (fqn, renames.get(kind, kind)): theirs for (fqn, kind), theirs in self._names.items() if kind not in dropped
        }
        available = self._source.tensors()
        self._tensors = {ours: available[theirs] for ours, theirs in self._names.items()}
        self._state_notes += [f"{old} of the checkpoint continues as {new}" for old, new in renames.items()]
        if dropped and missing:
            self._state_notes.append(
                f"{', '.join(dropped)} of the checkpoint belong to another optimizer, and this one needs "
                f"{', '.join(sorted(missing))}: its states begin at zero"
            )
        elif dropped:
            self._state_notes.append(f"the optimizer has no {', '.join(dropped)}: not taken from the checkpoint")

    def tensors(self) -> Mapping[Key, TensorInfo]:
        """Return the matching tensors, by ``(fqn, kind)`` in the model."""
        return self._tensors

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on."""
        self._source.read(*self._names[fqn, kind], start=start, out=out)

    def notes(self) -> list[str]:
        """Return notes for the user on everything that is not taken as it was saved."""
        notes = [*self._state_notes]
        if self.missing:
            notes.append(
                f"the checkpoint has nothing that fits {_some(self.missing)}: initial values are kept, and EMA states "
                "start at zero (checkpoint.allow_missing)"
            )
        if self.unused:
            notes.append(f"{_some(self.unused)} of the checkpoint are not used (checkpoint.allow_missing)")
        return notes


@dataclass
class _Report:
    """Differences in groups, a line for each tensor."""

    renames: list[str] = field(default_factory=list)
    only_model: list[str] = field(default_factory=list)
    only_checkpoint: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        groups = {
            "checkpoint.rename": self.renames,
            "only in the model": self.only_model,
            "only in the checkpoint": self.only_checkpoint,
            "changed": self.changed,
        }
        lines = [line for title, found in groups.items() if found for line in (f" {title}:", *found)]
        if lines:
            raise CheckpointError(
                "\n".join(
                    [
                        "the checkpoint does not fit the model:",
                        *lines,
                        " fix: name what was renamed in checkpoint.rename={old: new} (names or prefixes), and what may "
                        "be on one side only, or changed, in checkpoint.allow_missing=[patterns]",
                    ]
                )
            )


def match(
    source: ShardSource,
    wanted: Mapping[Key, TensorInfo],
    *,
    rename: Mapping[str, str],
    allow_missing: Iterable[str],
) -> MatchedSource:
    """Find each parameter and buffer of a model in a checkpoint.

    Parameters
    ----------
    source : ShardSource
        The checkpoint.
    wanted : Mapping[Key, TensorInfo]
        The model's parameters (``param``) and buffers (``buffer``), as they are declared.
    rename : Mapping[str, str]
        As in :func:`renamed`. A checkpoint that has the new names already is left as it is.
    allow_missing : Iterable[str]
        Patterns of names that may be on one side only, or be another tensor on the two sides.

    Raises
    ------
    CheckpointError
        With everything that differs.
    """
    available, patterns = source.tensors(), list(allow_missing)
    report = _Report()
    names = _rename(available, rename, report)
    tensors = {key: available[theirs] for key, theirs in names.items()}
    allowed = {fqn for fqn, _ in {*tensors, *wanted} if any(fnmatchcase(fqn, pattern) for pattern in patterns)}
    missing = []
    for (fqn, kind), info in wanted.items():
        found = _weight_key(fqn, kind, tensors)
        text = _difference(kind, info, tensors.get(found))
        if text is None:
            continue
        missing.append(fqn)
        if fqn not in allowed:
            is_searched = found not in tensors and len(report.only_model) < _NUM_NEAREST
            near = _nearest(fqn, info, tensors, wanted) if is_searched else ""
            (report.changed if found in tensors else report.only_model).append(f"  {fqn}: {text}{near}")
    known = {fqn for fqn, _ in wanted}
    # The other way round too: an unused tensor is more likely a renamed module than a leftover.
    unused = sorted({fqn for fqn, _ in tensors if fqn not in known})
    for fqn in unused:
        if fqn not in allowed:
            kind = next((kind for kind in _KINDS if (fqn, kind) in tensors), "state")
            report.only_checkpoint.append(f"  {fqn}: {_KINDS.get(kind, kind)}{_describe(tensors.get((fqn, kind)))}")
    report.raise_if_any()
    left_out = set(missing)
    # A state goes with its parameter: one of a newly initialised parameter would drag it back to the old weights.
    fits = {key for key in wanted if key[0] not in left_out}
    kept = {key: names[_weight_key(*key, tensors)] for key in fits}
    kept |= {key: names[key] for key in names if key[1] not in _KINDS and (key[0], "param") in fits}
    return MatchedSource(source, kept, missing=missing, unused=unused)


def _weight_key(fqn: str, kind: str, tensors: Mapping[Key, TensorInfo]) -> Key:
    """Return the key of a weight: a buffer of the model may be a parameter in the checkpoint. The name counts."""
    other = "buffer" if kind == "param" else "param"
    return (fqn, other) if (fqn, kind) not in tensors and (fqn, other) in tensors else (fqn, kind)


def _rename(available: Mapping[Key, TensorInfo], rename: Mapping[str, str], report: _Report) -> dict[Key, Key]:
    """Return the checkpoint's tensors by the names that they are given."""
    names: dict[Key, Key] = {}
    fqns = {fqn for fqn, _ in available}
    # The new name counts as well: the run's own later checkpoints have it already, under the same configuration.
    for old, new in rename.items():
        if old and new and not any(is_below(fqn, (old, new)) for fqn in fqns):
            near = difflib.get_close_matches(old, sorted(fqns), n=3)
            report.renames.append(f"  {old}: not in the checkpoint" + (f"; nearest: {', '.join(near)}" if near else ""))
    for key in available:
        ours = (renamed(key[0], rename), key[1])
        if ours in names:
            report.renames.append(f"  {names[ours][0]} and {key[0]} would both be {ours[0]} ({ours[1]})")
        names[ours] = key
    return names


def _difference(kind: str, info: TensorInfo, found: TensorInfo | None) -> str | None:
    """Return how a tensor differs between model and checkpoint; None if it does not."""
    if found is None:
        return f"{_KINDS[kind]}{_describe(info)}"
    differences = []
    if found.global_shape != info.global_shape:
        differences.append(f"shape {found.global_shape} in the checkpoint, {info.global_shape} in the model")
    if not _same_type(found.dtype, info.dtype):
        differences.append(f"type {_short(found.dtype)} in the checkpoint, {_short(info.dtype)} in the model")
    return "; ".join(differences) or None


def _same_type(saved: torch.dtype, declared: torch.dtype) -> bool:
    """Whether two types are equal, or differ only because an engine stores bf16."""
    # Frozen parameters and buffers under an engine that computes in bf16; nothing is lost.
    return saved == declared or (saved == torch.bfloat16 and declared == torch.float32)


def _nearest(fqn: str, info: TensorInfo, tensors: Mapping[Key, TensorInfo], wanted: Mapping[Key, TensorInfo]) -> str:
    """Name the likeliest counterpart in the checkpoint: of the same shape or last name, or else the most alike."""
    taken = {name for name, _ in wanted}
    free = {name: i for (name, kind), i in tensors.items() if kind in _KINDS and name not in taken}
    near = difflib.get_close_matches(fqn, free, n=3, cutoff=0.5)
    if not near:
        return ""

    def unlike(name: str) -> tuple[bool, bool]:
        return free[name].global_shape != info.global_shape, name.rpartition(".")[2] != fqn.rpartition(".")[2]

    best = min(near, key=unlike)
    return f"; nearest in the checkpoint: {best}{_describe(free[best])}"


def _describe(info: TensorInfo | None) -> str:
    return f" {tuple(info.global_shape)} {_short(info.dtype)}" if info else ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class WeightsOnly:
    """A source without the optimizer's states, and without the average of its weights."""

    def __init__(self, source: ShardSource) -> None:
        self._source = source

    def tensors(self) -> Mapping[Key, TensorInfo]:
        """Return parameters and buffers."""
        return {key: info for key, info in self._source.tensors().items() if key[1] in _KINDS}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on."""
        self._source.read(fqn, kind, start=start, out=out)
