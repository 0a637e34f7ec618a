"""Distributed training of data-driven weather models. Importing this package imports no torch."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # ``load_run``, for notebooks; not before it is asked for, since it imports torch.
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("anemoi_dist.tasks.forecast.trained").load_run
