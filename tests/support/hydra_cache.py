"""Composing the same groups once per test session: Hydra takes most of the time of the tests that compose."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from anemoi_dist.config import compose as module

_compose = module._hydra_compose
_seen: dict[tuple[tuple[str, str], ...], Any] = {}


def use_hydra_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember what Hydra makes of the package's own groups, which no test changes."""

    def cached(chosen: dict[str, str], config_dir: Path | None) -> Any:
        if config_dir is not None:
            return _compose(chosen, config_dir)
        key = tuple(chosen.items())
        if key not in _seen:
            _seen[key] = _compose(chosen, None)
        return copy.deepcopy(_seen[key])

    monkeypatch.setattr(module, "_hydra_compose", cached)
