"""Models that are wrong, or right, in ways that models of users are."""

from __future__ import annotations

import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, *, data, **_):
        super().__init__()
        self.a = nn.Linear(data.multistep_input * len(data.variables), len(data.prognostic))

    def forward(self, x):
        batch, time, ensemble, grid, variables = x.shape
        return self.a(x.permute(0, 2, 3, 1, 4).reshape(batch, ensemble, grid, time * variables))


class Shifted(Plain):
    def forward(self, x):
        return super().forward(x - 0.5)


class ShiftsInPlace(Plain):
    def forward(self, x):
        x -= 0.5
        return super().forward(x)


class OneColumn(Plain):
    def forward(self, x):
        return super().forward(x)[..., :1]


class Swapped(Plain):
    def forward(self, x):
        return super().forward(x).transpose(1, 2)


class Dictionary(Plain):
    def forward(self, x):
        return {"output": super().forward(x)}


class OnRawInput(Plain):
    def forward(self, x):
        return self.a(x)


class Sparse(Plain):
    def __init__(self, *, data, **_):
        super().__init__(data=data)
        self.table = nn.Embedding(4, len(data.prognostic), sparse=True)

    def forward(self, x):
        return super().forward(x) + self.table(torch.zeros((), dtype=torch.int64, device=x.device))


class Lazy(Plain):
    def __init__(self, *, data, **_):
        super().__init__(data=data)
        self.a = nn.LazyLinear(len(data.prognostic))


class ExtraState(Plain):
    def get_extra_state(self):
        return torch.tensor(1)


class ComplexBuffer(Plain):
    def __init__(self, *, data, persistent=True, **_):
        super().__init__(data=data)
        self.register_buffer("twiddle", torch.ones(3, dtype=torch.complex64), persistent=persistent)


class LateBuffer(Plain):
    def __init__(self, *, data, **_):
        super().__init__(data=data)
        self.register_buffer("seen", None)

    def forward(self, x):
        self.seen = torch.zeros((), device=x.device) if self.seen is None else self.seen + 1
        return super().forward(x)


class GrowingBuffer(Plain):
    def __init__(self, *, data, **_):
        super().__init__(data=data)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = torch.cat((self.seen, x.detach().mean().view(1)))
        return super().forward(x)
