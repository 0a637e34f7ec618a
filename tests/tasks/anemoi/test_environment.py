from __future__ import annotations

import importlib
from typing import Any

import pytest

from anemoi_dist.errors import PreflightError
from anemoi_dist.tasks.anemoi.environment import import_anemoi_training


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'anemoi'"), "needs anemoi-training: No module named 'anemoi'"),
        (RuntimeError("operator torchvision::nms does not exist"), "nms does not exist; `pip uninstall torchvision`"),
    ],
)
def test_what_cannot_be_imported_is_one_error(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fails(_: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(PreflightError) as raised:
        import_anemoi_training.__wrapped__()
    assert said in str(raised.value)
