"""timm's learning rate schedulers, without the rest of timm.

``import timm`` imports every model that timm has, and fails where torchvision does not match torch; its schedulers
need neither.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from anemoi_dist.errors import PreflightError

_NAME = "timm.scheduler"


def enter_bare_timm() -> None:
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


@functools.cache
def load_timm_scheduler() -> ModuleType:
    """Return the module ``timm.scheduler``; ``sys.modules`` is left as it was found.

    A later ``import timm`` is therefore the real one, with its own copies of the scheduler classes.

    Raises
    ------
    PreflightError
        timm is not installed.
    """
    if "timm" in sys.modules:
        return importlib.import_module(_NAME)
    spec = importlib.util.find_spec("timm")
    if spec is None:
        raise PreflightError("timm is not installed; its scheduler needs nothing else: pip install --no-deps timm")
    before = set(sys.modules)
    # The package itself is never executed: importing a submodule needs only its __path__.
    sys.modules["timm"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(_NAME)
    finally:
        for name in set(sys.modules) - before:
            if name == "timm" or name.startswith("timm."):
                del sys.modules[name]
