"""A model that does not come back from one of its calls, as ``HANG=<how>:<rank>:<call>`` in the environment says.

``PAUSE_S=<seconds>`` is for tests that want to hit a run in the middle.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

import torch

from anemoi_dist.data.batch import DataSpec
from anemoi_dist.models.latlon import LatLonCNN
from anemoi_dist.telemetry.heartbeat import beat

#: What ``slow`` takes, in all, and from one sign of life to the next.
SLOW_S, PIECE_S = 10.0, 0.5


class HangingModel(LatLonCNN):
    def __init__(self, data: DataSpec, **arguments: Any) -> None:
        super().__init__(data, **arguments)
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        if self.training:
            time.sleep(float(os.environ.get("PAUSE_S", "0")))
        how, rank, call = os.environ.get("HANG", "never:0:0").split(":")
        if self.num_calls == int(call) and os.environ["RANK"] == rank:
            hang(how)
        return super().forward(x)


def hang(how: str) -> None:
    if how == "sleep":
        time.sleep(10_000)
    elif how == "lock":  # in C, with the interpreter lock
        ctypes.PyDLL(None).sleep(10_000)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "slow":  # and yet at work
        for _ in range(int(SLOW_S / PIECE_S)):
            time.sleep(PIECE_S)
            beat()
    else:
        raise ValueError(how)
