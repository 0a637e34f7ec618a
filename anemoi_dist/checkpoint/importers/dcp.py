"""Directories of ``torch.distributed.checkpoint``, read without its loader, which opens any pickle in them."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.checkpoint.importers.foreign import ForeignCheckpoint, checked, kind_of, whole
from anemoi_dist.checkpoint.importers.pickles import load_dcp_metadata, load_tensor
from anemoi_dist.errors import ConfigError

_MODEL_ROOTS = ("model", "state_dict", "module")


def read_dcp(source: Path, *, trust: bool, weights_only: bool) -> ForeignCheckpoint:
    """Read a directory that ``torch.distributed.checkpoint.save`` wrote, from any number of ranks.

    Returns
    -------
    ForeignCheckpoint
        Whole tensors, without a step: the optimizer's counters say it. Objects that are no tensors are not opened.
    """
    metadata = load_dcp_metadata(source / ".metadata", trust=trust)
    paths = metadata.planner_data or {}
    states: dict[str, tuple[str, str]] = {}
    roots: dict[tuple[str, ...], dict[str, str]] = {}
    for key, info in metadata.state_dict_metadata.items():
        if not hasattr(info, "chunks"):
            continue  # bytes of a pickled object: a step counter at best, and opening it may run code
        path = tuple(map(str, paths.get(key, (key,))))
        if len(path) >= 3 and path[-3] == "state":
            states[key] = (path[-2], path[-1])
        elif "param_groups" not in path:
            roots.setdefault(path[:-1], {})[key] = path[-1]
    weights = _model_of(source, roots)
    trained = {fqn for fqn, _ in states.values()}
    places = _places(metadata)
    shards = []
    for key, name in weights.items():
        tensor = _read(source, metadata, key, places[key])
        shards.append(whole(name, kind_of(name, tensor, trained=trained), tensor))
    if not weights_only:
        shards += [whole(fqn, kind, _read(source, metadata, key, places[key])) for key, (fqn, kind) in states.items()]
    return ForeignCheckpoint("dcp", None, shards)


def _model_of(source: Path, roots: dict[tuple[str, ...], dict[str, str]]) -> dict[str, str]:
    """Return key -> name of the model's tensors, of all dictionaries that were saved together."""
    if len(roots) == 1:
        return next(iter(roots.values()))
    named = [keys for root, keys in roots.items() if root and root[-1] in _MODEL_ROOTS]
    if len(named) != 1:
        found = [".".join(root) or "(top)" for root in roots]
        raise ConfigError("SOURCE", str(source), f"has no one model among {', '.join(found)}", valid=_MODEL_ROOTS)
    return named[0]


def _places(metadata: Any) -> dict[str, dict[tuple[int, ...], Any]]:
    """Return where each chunk lies, by key and offset; a tensor that was not cut has the offset ()."""
    places: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, place in metadata.storage_data.items():
        places.setdefault(index.fqn, {})[tuple(index.offset or ())] = place
    return places


def _read(source: Path, metadata: Any, key: str, places: dict[tuple[int, ...], Any]) -> torch.Tensor:
    """Join the chunks of one tensor."""
    info = metadata.state_dict_metadata[key]
    if math.prod(info.size) * info.properties.dtype.itemsize > _num_bytes(source):
        raise ConfigError("SOURCE", str(source), f"{key} of {tuple(info.size)} is larger than all the files")
    out = torch.empty(info.size, dtype=info.properties.dtype)
    is_filled = torch.zeros(info.size, dtype=torch.bool)
    for chunk in info.chunks:
        # A tensor that was saved whole has one entry, without an offset.
        place = places.get(tuple(chunk.offsets)) or places.get(())
        if place is None:
            raise ConfigError("SOURCE", str(source), f"{key} has no data at {tuple(chunk.offsets)}")
        piece = _load_chunk(source, place, key)
        if piece.shape != chunk.sizes:
            raise ConfigError("SOURCE", str(source), f"{key} has {tuple(piece.shape)}, saved was {tuple(chunk.sizes)}")
        target, filled = out, is_filled
        for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            target, filled = target.narrow(dimension, offset, size), filled.narrow(dimension, offset, size)
        target.copy_(checked(key, piece))
        filled.fill_(True)
    if not is_filled.all():  # counting elements would take overlapping chunks for whole
        raise ConfigError("SOURCE", str(source), f"{key} has {int(is_filled.sum())} of {out.numel()} elements")
    return out


@functools.cache
def _num_bytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.iterdir())


def _load_chunk(source: Path, place: Any, key: str) -> torch.Tensor:
    if place.transform_descriptors:
        raise ConfigError(
            "SOURCE", str(source), f"{key} is stored with {place.transform_descriptors}, which is not read"
        )
    # The path comes from a pickle: one with ".." would read any file of this machine into the model.
    file = source / place.relative_path
    if file.resolve().parent != source.resolve():
        raise ConfigError("SOURCE", str(source), f"{key} lies in {place.relative_path}, outside of the directory")
    with file.open("rb") as stream:
        stream.seek(place.offset)
        return load_tensor(stream.read(place.length), path=file)
