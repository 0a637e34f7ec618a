"""``OddModel`` after a day of changes: a layer renamed, one added, parameters gone, reshaped and retyped."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from anemoi_dist.config.parse import from_container, to_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.data.batch import DataSpec
from support import toy

RENAME = {"model.head": "model.output"}
ALLOW_MISSING = ["model.extra.*", "model.gain", "model.frozen", "model.num_calls"]


class ChangedModel(nn.Module):
    def __init__(self, *, data: DataSpec) -> None:
        super().__init__()
        num_in = data.multistep_input * len(data.variables)
        self.blocks = nn.ModuleList([nn.Linear(num_in, 7), nn.Linear(7, 13), nn.Linear(13, 5)])
        self.output = nn.Linear(5, len(data.prognostic))
        self.extra = nn.Linear(5, 5)
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 4), requires_grad=False)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        batch, time, ensemble, grid, variable = x.shape
        hidden = x.permute(0, 2, 3, 1, 4).reshape(batch, ensemble, grid, time * variable)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.output(hidden + 0.1 * self.extra(hidden)) + self.frozen.sum()


def make_config(engine: str, checkpoint: dict[str, Any], **training: Any) -> Config:
    """Return the configuration of ``toy`` with the changed model."""
    import yaml

    container = yaml.safe_load(to_yaml(toy.make_config(engine, **training)))
    container["model"] = {"_target_": "support.changed.ChangedModel"}
    container["security"] = {"allowed_targets": ["support.changed"]}
    container["checkpoint"] |= checkpoint
    return from_container(container)
