"""Import of anemoi-training into this process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from anemoi_dist.data.anemoi import keep_in_process
from anemoi_dist.errors import PreflightError


@functools.cache
def import_anemoi_training() -> ModuleType:
    """Return the module ``anemoi.training.train.train``.

    Raises
    ------
    PreflightError
        It, or something that it needs, cannot be imported.
    """
    try:
        _enter_bare_timm()
        keep_in_process()
        return importlib.import_module("anemoi.training.train.train")
    except ImportError as error:
        raise PreflightError(f"task=anemoi needs anemoi-training: {error}") from error


def _enter_bare_timm() -> None:
    """Let ``timm.scheduler``, all that anemoi-training needs of timm, be imported without the rest.

    ``import timm`` takes seconds for its models, and fails beside a CPU build of torch, where torchvision cannot be
    loaded. Whoever does need the rest gets it at the first use.
    """
    spec = importlib.util.find_spec("timm")
    if "timm" in sys.modules or spec is None:
        return
    bare = importlib.util.module_from_spec(spec)

    def whole(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        assert spec is not None and spec.loader is not None
        del bare.__dict__["__getattr__"]
        spec.loader.exec_module(bare)
        return getattr(bare, name)

    bare.__dict__["__getattr__"] = whole
    sys.modules["timm"] = bare
