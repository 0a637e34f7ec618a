"""Import of anemoi-training into this process."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from anemoi_dist.config.timm_scheduler import enter_bare_timm
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
        enter_bare_timm()
        keep_in_process()
        return importlib.import_module("anemoi.training.train.train")
    except (ImportError, RuntimeError) as error:  # torchvision's, where it was not built for this torch
        fix = "; `pip uninstall torchvision`: it is not needed" if "torchvision" in str(error) else ""
        raise PreflightError(f"task=anemoi needs anemoi-training: {error}{fix}") from error
