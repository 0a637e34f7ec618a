"""Lightning in the tests' environment: imported past broken neighbours, and with nothing shown or written."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest import mock

import pytest


def import_lightning() -> ModuleType:
    """torchmetrics imports torchvision wherever it is installed, and one built for another torch cannot be imported."""
    pytest.importorskip("lightning_utilities")
    from lightning_utilities.core.imports import RequirementCache

    check = RequirementCache._check_available

    def without_torchvision(cache: RequirementCache) -> None:
        if cache.requirement and cache.requirement.startswith("torchvision"):
            cache.available, cache.message = False, "does not match torch"
        check(cache)

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with mock.patch.object(RequirementCache, "_check_available", without_torchvision):
            return pytest.importorskip("lightning")
    return pytest.importorskip("lightning")


lightning = import_lightning()


def quiet_trainer(*, max_steps: int, **more: Any) -> Any:
    """A Trainer on one CPU process that keeps to itself."""
    return lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        # Named, for Lightning would look for an MPI library to find out, and fail where mpi4py stands without one.
        plugins=[lightning.fabric.plugins.environments.LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
