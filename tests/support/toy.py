"""A small module whose sizes divide by nothing, and the single process that every engine must agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from anemoi_dist.checkpoint.shard import Shard, TensorInfo
from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.engines import ENGINES
from anemoi_dist.config.parse import from_container
from anemoi_dist.config.schema import Config
from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import Engine
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.tasks.forecast.module import BaseGraphModule

SHARDED = tuple(name for name, spec in ENGINES.items() if spec.partitioned)
GRID = 35
GLOBAL_BATCH = 8


class OddModel(nn.Module):
    """Layers of 7, 13, 5 and 1; one frozen weight; a buffer that is saved."""

    def __init__(self, *, data: DataSpec) -> None:
        super().__init__()
        num_in = data.multistep_input * len(data.variables)
        self.blocks = nn.ModuleList([nn.Linear(num_in, 7), nn.Linear(7, 13), nn.Linear(13, 5)])
        self.head = nn.Linear(5, len(data.prognostic))
        self.gain = nn.Parameter(torch.full((1,), 1.5))
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 3), requires_grad=False)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        batch, time, ensemble, grid, variable = x.shape
        hidden = x.permute(0, 2, 3, 1, 4).reshape(batch, ensemble, grid, time * variable)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(hidden) * self.gain + self.frozen.sum()


class SometimesModel(nn.Module):
    """A branch that every second call uses, one that none uses, a weight laid out by columns, running statistics."""

    def __init__(self, *, data: DataSpec) -> None:
        super().__init__()
        num_in = data.multistep_input * len(data.variables)
        self.norm = nn.BatchNorm1d(num_in)
        self.always = nn.Linear(num_in, len(data.prognostic))
        self.always.weight = nn.Parameter(self.always.weight.detach().t().contiguous().t())
        self.sometimes = nn.Linear(num_in, len(data.prognostic))
        self.never = nn.Linear(3, 2)
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, ensemble, grid, variable = x.shape
        flat = x.permute(0, 2, 3, 1, 4).reshape(-1, time * variable)
        hidden = self.norm(flat)
        out = self.always(hidden)
        if self.training:
            self.num_calls += 1
        if self.num_calls % 2:
            out = out + self.sometimes(hidden)
        return out.view(batch, ensemble, grid, -1)


def make_spec() -> DataSpec:
    rng = np.random.default_rng(0)
    variables = ("msl", "t2m", "sun")
    return DataSpec(
        variables=variables,
        forcing=("sun",),
        latitudes=np.linspace(-80, 80, GRID),
        longitudes=np.linspace(0, 350, GRID),
        field_shape=(GRID,),
        mean=np.array([101_325.0, 280.0, 0.5]),
        stdev=np.array([1000.0, 15.0, 0.3]),
        tendency_stdev=np.array([200.0, 3.0, 0.2]) * (1 + 0.01 * rng.random(3)),
        multistep_input=2,
        frequency_s=21_600,
    )


def make_config(engine: str, **training: Any) -> Config:
    return from_container(
        {
            "training": {
                "max_steps": 40,
                "global_batch_size": GLOBAL_BATCH,
                "lr": {"rate": 0.02, "warmup": 3, "min": 1e-4},
                "optimizer": {
                    "_target_": "anemoi_dist.optimizers.ademamix.AdEMAMix",
                    "betas": [0.9, 0.999, 0.9999],
                    "alpha": 5.0,
                    "beta3_warmup": 30,
                    "alpha_warmup": 30,
                    "weight_decay": 0.01,
                },
                "scheduler": {"_target_": "timm.scheduler.CosineLRScheduler"},
                **training,
            },
            "engine": {key: getattr(ENGINES[engine], key) for key in ("kind", "stage", "offload")},
            "data": {"kind": "synthetic", "forcing": ["sun"]},
            "model": {"_target_": "support.toy.OddModel"},
            "security": {"allowed_targets": ["support.toy"]},
        }
    )


def make_module(config: Config) -> BaseGraphModule:
    torch.manual_seed(7)
    return BaseGraphModule(config, spec=make_spec())


def make_batch(step: int, *, rollout: int = 1, size: int = GLOBAL_BATCH) -> Batch:
    """The global batch of a step: the same for any number of ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    spec = make_spec()
    noise = torch.randn(size, 2 + rollout, 1, GRID, 3, generator=generator)
    walk = noise.cumsum(1) * torch.tensor(spec.tendency_stdev, dtype=torch.float32)
    fields = torch.tensor(spec.mean, dtype=torch.float32) + walk
    return Batch(fields, torch.arange(size, dtype=torch.int64) * 21_600)


def micro_batches(config: Config, world: World, step: int) -> list[Batch]:
    plan = plan_batches(config, world_size=world.world_size)
    whole = make_batch(step, rollout=config.training.rollout, size=config.training.global_batch_size)
    first = world.rank * plan.rank_size
    cuts = [first + i * plan.micro_size for i in range(plan.accumulation)]
    return [Batch(*(part[cut : cut + plan.micro_size] for part in whole)) for cut in cuts]


def reference(config: Config, num_steps: int) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Train in this process, without an engine. Return parameters and states, losses and gradient norms."""
    from anemoi_dist.optimizers.learning_rate import set_num_updates

    module = make_module(config)
    created = module.configure_optimizers()
    optimizer, scheduler = created["optimizer"], created["lr_scheduler"]["scheduler"]
    losses, norms = [], []
    for step in range(num_steps):
        batch = make_batch(step, rollout=config.training.rollout)
        loss = module(batch)
        loss.backward()
        limit = config.training.clip_grad_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), limit)))
        if config.training.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(module.parameters(), config.training.clip_grad_value)
        optimizer.step()
        optimizer.zero_grad()
        set_num_updates(scheduler, step + 1)
        losses.append(loss.item())
    values = {}
    for name, parameter in module.named_parameters():
        values[f"{name}:param"] = parameter.detach().clone()
        for kind, state in optimizer.state.get(parameter, {}).items():
            values[f"{name}:{kind}"] = state.clone()
    return values, losses, norms


def whole_tensors(shards_by_rank: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Join all ranks' shards into whole tensors; fails where an element is missing or comes twice."""
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for shards in shards_by_rank:
        for shard in shards:
            key = f"{shard.fqn}:{shard.kind}"
            assert shapes.setdefault(key, shard.global_shape) == shard.global_shape
            pieces.setdefault(key, []).append((shard.start, shard.tensor))
    whole = {}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        position = 0
        for start, tensor in parts:
            assert start == position, f"{key}: element {position} is missing or comes twice"
            position += tensor.numel()
        whole[key] = torch.cat([tensor for _, tensor in parts]).view(shapes[key])
    return whole


class Whole:
    """Whole tensors by ``fqn:kind``, as a source to load from."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = {tuple(key.rsplit(":", 1)): tensor for key, tensor in tensors.items()}

    def tensors(self) -> dict[tuple[str, str], TensorInfo]:
        return {key: TensorInfo(tuple(x.shape), x.dtype) for key, x in self._tensors.items()}  # type: ignore[misc]

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        out.copy_(self._tensors[fqn, kind].reshape(-1)[start : start + out.numel()])


def build(world: World, config: Config) -> Engine:
    return create_engine(make_module(config), config=config, world=world)


def clone_shards(engine: Engine) -> list[Any]:
    return clone_shards_of(engine.shards())


def clone_shards_of(shards: Iterable[Shard]) -> list[Shard]:
    return [dataclasses.replace(s, tensor=s.tensor.detach().clone()) for s in shards]
