"""The table of engines agrees with the files of ``engine=``, with the classes it names and with the documentation."""

import importlib
import re
from pathlib import Path

import pytest

from anemoi_dist.config.compose import compose
from anemoi_dist.config.engines import ENGINES
from anemoi_dist.config.overrides import available_groups

ROOT = Path(__file__).parents[2]


def test_every_engine_that_can_be_chosen_is_in_the_table():
    assert set(ENGINES) == set(available_groups()["engine"])
    assert [compose([f"engine={name}"]).config.engine.spec.name for name in ENGINES] == list(ENGINES)


@pytest.mark.parametrize("spec", ENGINES.values(), ids=ENGINES)
def test_the_class_of_an_engine_exists(spec):
    module, name = spec.target.split(":")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_the_documentation_says_what_each_engine_partitions():
    text = (ROOT / "docs" / "how-to" / "engine.rst").read_text(encoding="utf-8")
    table = text.partition("``engine=``")[2].partition("N is the number")[0]
    rows = re.findall(r"^``(\w+)``(.*)", table, re.MULTILINE)
    cells = {name: re.findall(r" (whole|1/N)\b", row) for name, row in rows}
    for name, spec in ENGINES.items():
        kinds = ("parameters", "gradients", "states")
        assert cells[name] == ["1/N" if kind in spec.partitioned else "whole" for kind in kinds], name
