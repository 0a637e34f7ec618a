from __future__ import annotations

import resource

import pytest

from anemoi_dist.errors import PreflightError
from anemoi_dist.process.limits import raise_open_files


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the limits that have been set; the last one is in force."""
    set_to = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: set_to[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: set_to.append(both))
    return set_to


def test_the_limit_goes_up_as_far_as_it_may(limits: list[tuple[int, int]]) -> None:
    raise_open_files(512)
    raise_open_files(960)
    assert limits == [(1024, 4096), (4096, 4096)]


def test_more_ranks_than_the_limit_bears_are_refused(limits: list[tuple[int, int]]) -> None:
    with pytest.raises(PreflightError, match=r"1024 ranks need 4352 open files in each, and this machine allows 4096"):
        raise_open_files(1024)


def test_no_limit_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise_open_files(1_000_000)
