from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import anemoi_dist
from anemoi_dist.telemetry.console import print_warnings_plainly


def test_warnings_of_the_package_are_one_line_and_others_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", before)
    print_warnings_plainly()
    ours = str(Path(anemoi_dist.__file__).parent / "tasks" / "base.py")
    assert warnings.formatwarning("too long", UserWarning, ours, 3) == "warning: too long\n"
    others = ("too old", FutureWarning, "/elsewhere/torch.py", 3, "call()")
    assert warnings.formatwarning(*others) == before(*others)
