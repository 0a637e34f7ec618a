"""A small model with what imports trip over: buffers between parameters, a tied weight, a frozen one."""

from __future__ import annotations

import torch
from torch import nn


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 3, bias=False)
        self.last = nn.Linear(3, 4, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.norm(self.first(x)))) * self.scale.sum()


def trained(optimizer: type[torch.optim.Optimizer], *, num_steps: int = 3, **options: object):
    """Return the model and its optimizer after some steps."""
    torch.manual_seed(0)
    model = TiedModel()
    named = options.pop("named", False)
    parameters = [(n, p) if named else p for n, p in model.named_parameters() if p.requires_grad]
    built = optimizer(parameters, **options)
    for _ in range(num_steps):
        model(torch.randn(5, 3)).square().mean().backward()
        built.step()
        built.zero_grad()
    return model, built
