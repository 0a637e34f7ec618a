"""A module with all that makes resharding hard: odd shapes, tied weights, frozen parameters, groups, buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from anemoi_dist.config.schema import Config
from anemoi_dist.data.batch import DataSpec
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import Engine
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.tasks.forecast.module import BaseGraphModule
from support import toy

#: Divides by 1, 2, 3 and 4 ranks; no tensor of the model does.
GLOBAL_BATCH = 12


class TiedModel(nn.Module):
    """``first`` and ``again`` share one weight; a scalar, a 3-d and a frozen parameter; a persistent buffer."""

    def __init__(self, *, data: DataSpec) -> None:
        super().__init__()
        num_in = data.multistep_input * len(data.variables)
        self.enter = nn.Linear(num_in, 11)
        self.first = nn.Linear(11, 11, bias=False)
        self.again = nn.Linear(11, 11)
        self.again.weight = self.first.weight
        self.head = nn.Linear(11, len(data.prognostic))
        self.mix = nn.Parameter(torch.randn(5, 1, 1) * 0.1)
        self.gain = nn.Parameter(torch.full((1,), 1.5))
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 23).view(23, 1), requires_grad=False)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("offsets", torch.linspace(0, 1, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        batch, time, ensemble, grid, variable = x.shape
        hidden = torch.tanh(self.enter(x.permute(0, 2, 3, 1, 4).reshape(batch, ensemble, grid, time * variable)))
        hidden = torch.tanh(self.again(torch.tanh(self.first(hidden))))
        return self.head(hidden) * self.gain + self.mix.sum() + self.frozen.sum() + self.offsets.sum()


class GroupedModule(BaseGraphModule):
    """Two groups: matrices with weight decay, the rest without."""

    def configure_optimizers(self) -> dict[str, Any]:
        created = super().configure_optimizers()
        optimizer = created["optimizer"]
        (group,) = optimizer.param_groups
        parameters = group["params"]
        group["params"] = [p for p in parameters if p.dim() == 2]
        rest = {key: value for key, value in group.items() if key != "params"}
        optimizer.add_param_group({**rest, "params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0})
        return created


def make_config(engine: str, **training: Any) -> Config:
    config = toy.make_config(engine, global_batch_size=GLOBAL_BATCH, **training)
    config.model = {"_target_": "support.reshard.TiedModel"}
    config.security.allowed_targets = ["support.reshard"]
    return config


def build(world: World, config: Config) -> Engine:
    torch.manual_seed(7)
    return create_engine(GroupedModule(config, spec=toy.make_spec()), config=config, world=world)
