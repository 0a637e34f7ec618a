"""Composing the same groups once per test session: Hydra takes most of the time of the tests that compose."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from anemoi_dist.config import compose as module


def use_hydra_cache() -> None:
    """Remember what Hydra makes of the package's own groups, which no test changes."""
    compose = module._hydra_compose

    @functools.cache
    def once(chosen: tuple[tuple[str, str], ...]) -> Any:
        return compose(dict(chosen), None)

    def cached(chosen: dict[str, str], config_dir: Path | None) -> Any:
        return compose(chosen, config_dir) if config_dir is not None else copy.deepcopy(once(tuple(chosen.items())))

    module._hydra_compose = cached
