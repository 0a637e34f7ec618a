"""Pools of gloo ranks, shared by all tests that need them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from support.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Return ``ranks(n)``: a running pool of n ranks, started when first asked for."""
    pools: dict[int, RankPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks not in pools or not pools[num_ranks].is_alive:
            pools[num_ranks] = RankPool(num_ranks)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close()
