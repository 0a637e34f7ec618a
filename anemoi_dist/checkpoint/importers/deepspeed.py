"""DeepSpeed's own checkpoint directories, ZeRO stages 1 to 3: flat partitions, cut back into ranges of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.checkpoint.importers.foreign import ForeignCheckpoint, checked, state_tensors, whole
from anemoi_dist.checkpoint.importers.pickles import load_torch_file
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.errors import ConfigError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def read_deepspeed(source: Path, *, trust: bool, weights_only: bool) -> ForeignCheckpoint:
    """Read a directory that ``DeepSpeedEngine.save_checkpoint`` wrote, or one of the tags in it.

    Returns
    -------
    ForeignCheckpoint
        Ranges of fp32 masters and states; frozen parameters and buffers.
    """
    folder = _tag(source)
    files = _optimizer_files(folder)
    partitions = [load_torch_file(file, trust=trust)["optimizer_state_dict"] for file in files]
    stage = int(partitions[0]["zero_stage"])
    count = partitions[0]["partition_count"]
    expected = count if isinstance(count, int) else max(count)
    # With a rank's file missing, parameters would silently keep initial values where its partition was.
    if len(files) != expected:
        raise ConfigError("SOURCE", str(folder), f"has the partitions of {len(files)} ranks, saved were {expected}")
    if "ds_zero_partition_groups" in partitions[0]:
        raise ConfigError("SOURCE", str(folder), "was partitioned over several groups of ranks, which is not read")
    models = [load_torch_file(file, trust=trust) for file in _model_files(folder, stage, len(files))]
    if stage == 3:
        shards = [*_stage3(partitions, models), *_frozen_stage3(models)]
    else:
        shards = [*_stage12(partitions, models[0]), *_frozen_stage12(models[0])]
    shards += [whole(name, "buffer", models[0]["module"][name]) for name in models[0]["buffer_names"]]
    if weights_only:
        shards = [shard for shard in shards if shard.kind in ("param", "buffer")]
    return ForeignCheckpoint(f"zero{stage}", models[0].get("global_steps"), shards)


def _tag(source: Path) -> Path:
    """Return the directory of one checkpoint: the one that ``latest`` names, or the source itself."""
    if not (source / "latest").is_file():
        return source
    tag = (source / "latest").read_text(encoding="utf-8").strip()
    # The tag is a name within the directory; anything else would read from elsewhere.
    if not tag or Path(tag).name != tag or not (source / tag).is_dir():
        raise ConfigError("SOURCE", str(source), f"names {tag!r} as its latest checkpoint, which is not in it")
    return source / tag


def _optimizer_files(folder: Path) -> list[Path]:
    ranks = {int(m[1]): file for file in folder.iterdir() if (m := _OPTIMIZER_FILE.fullmatch(file.name))}
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise ConfigError(
            "SOURCE", str(folder), f"has the ZeRO partitions of ranks {sorted(ranks)} without model parallelism"
        )
    return [ranks[rank] for rank in range(len(ranks))]


def _model_files(folder: Path, stage: int, num_ranks: int) -> list[Path]:
    if stage < 3:
        return [folder / "mp_rank_00_model_states.pt"]
    return [folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(num_ranks)]


def _stage12(partitions: list[Any], model: Mapping[str, Any]) -> Iterator[Shard]:
    """Yield the ranges of each rank's partitions; DeepSpeed says what lies where, rank after rank."""
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    done = dict.fromkeys(shapes, 0)
    for partition in partitions:
        for group, mapping in enumerate(partition["param_slice_mappings"]):
            flat = {"param": partition["single_partition_of_fp32_groups"][group]}
            flat |= _states(partition["base_optimizer_state"], group)
            for name, piece in mapping.items():
                yield from _cut(flat, name, shapes[name], done[name], piece.start, piece.numel)
                done[name] += piece.numel
    _check_whole(done, shapes)


def _stage3(partitions: list[Any], models: list[Any]) -> Iterator[Shard]:
    """Yield the ranges of each rank: every parameter is cut into equal pieces, the last one padded."""
    num_ranks = len(partitions)
    shapes = {name: tuple(shape) for group in models[0]["param_shapes"] for name, shape in group.items()}
    done = dict.fromkeys(shapes, 0)
    for rank, partition in enumerate(partitions):
        for group, names in enumerate(models[0]["param_shapes"]):
            flat = {"param": partition["fp32_flat_groups"][group]}
            flat |= _states(partition["optimizer_state_dict"], group)
            offset = 0
            for name in names:
                total = math.prod(shapes[name])
                piece_numel = -(-total // num_ranks)
                start = rank * piece_numel
                numel = max(0, min(piece_numel, total - start))
                yield from _cut(flat, name, shapes[name], start, offset, numel)
                done[name] += numel
                offset += piece_numel
    _check_whole(done, shapes)


def _states(optimizer: Any, group: int) -> dict[str, torch.Tensor]:
    """Return the states of one flat partition; a step may be kept by the group."""
    state = dict(optimizer[group] if isinstance(optimizer, list) else optimizer["state"].get(group, {}))
    if "step" not in state and not isinstance(optimizer, list) and "step" in (own := optimizer["param_groups"][group]):
        state["step"] = own["step"]
    return state_tensors(state)


def _cut(
    flat: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], start: int, offset: int, numel: int
) -> Iterator[Shard]:
    for kind, tensor in flat.items():
        checked(name, tensor)
        if tensor.dim() == 0:
            if start == 0 and numel:
                yield Shard(name, kind, (), 0, tensor.detach().reshape(1))
        elif numel:
            yield Shard(name, kind, shape, start, tensor.detach().reshape(-1)[offset : offset + numel])


def _check_whole(done: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, numel in done.items():
        if numel != math.prod(shapes[name]):
            raise ConfigError("SOURCE", name, f"has {numel} of {math.prod(shapes[name])} elements in the partitions")


def _frozen_stage12(model: Mapping[str, Any]) -> Iterator[Shard]:
    trained = {name for group in model["param_shapes"] for name in group}
    # The state dictionary holds everything under the names that the module has: what is neither trained, a buffer nor a
    # second name of a tied weight is a frozen parameter.
    known = trained | {*model["buffer_names"], *model.get("shared_params", {})}
    for name, tensor in model["module"].items():
        if name not in known:
            yield whole(name, "param", tensor)


def _frozen_stage3(models: list[Any]) -> Iterator[Shard]:
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        start, total = 0, math.prod(shape)
        for model in models:
            piece = model["frozen_param_fragments"][name].detach().reshape(-1)[: total - start]
            if piece.numel():
                yield Shard(name, "param", tuple(shape), start, piece)
            start += piece.numel()
