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

from anemoi_dist.errors import PreflightError

_NAME = "timm.scheduler"


def provide_timm() -> None:
    """Make ``timm.scheduler`` importable for other packages where ``import timm`` fails.

    ``sys.modules`` keeps a bare package ``timm`` then, in which all else is missing.
    """
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # torch's RuntimeError for operators that torchvision's wheel does not find
        if (spec := importlib.util.find_spec("timm")) is not None:
            sys.modules["timm"] = importlib.util.module_from_spec(spec)


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
