"""Sphinx configuration. Build: ``.venv/bin/python -m sphinx -W -b html docs docs/_build``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import anemoi_dist
from anemoi_dist.config import schema

project = "anemoi-dist"
author = "the anemoi-dist developers"
copyright = "2026, the anemoi-dist developers"
release = version = anemoi_dist.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

html_theme = "alabaster"
html_theme_options = {"description": "Distributed training of data-driven weather models", "page_width": "1080px"}

napoleon_google_docstring = False
napoleon_use_ivar = True  # else an attribute of a dataclass is described twice
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# numpydoc's "latitudes, longitudes : array" is no reference to any of the attributes of these names.
suppress_warnings = ["ref.python"]


class ConfigurationKeys(SphinxDirective):
    """``.. configuration-keys::``, the table of all keys: defaults and comments are in the schema alone."""

    def run(self) -> list[nodes.Node]:
        """Return a table for each section of the configuration."""
        comments = ModuleAnalyzer.for_module(schema.__name__).find_attr_docs()
        text = "\n".join(_section(schema.Config, "", comments))
        return self.parse_text_to_nodes(text)


def _section(section: type, prefix: str, comments: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    """Yield the lines of one section's table, then those of the sections in it."""
    types = get_type_hints(section)
    own = [field for field in fields(section) if not is_dataclass(types[field.name])]
    if own:
        title = f"``{prefix.rstrip('.')}``: " if prefix else ""
        yield from (f"{title}{section.__doc__}", "", ".. list-table::", "   :widths: 30 16 54", "")
        for field in own:
            meaning = " ".join((*comments.get((section.__name__, field.name), ()), _bound(field))).strip()
            yield from (f"   * - ``{prefix}{field.name}``", f"     - ``{_default(field)}``", f"     - {meaning}")
        yield ""
    for field in fields(section):
        if field not in own:
            yield from _section(types[field.name], f"{prefix}{field.name}.", comments)


def _default(field: Field[Any]) -> str:
    """Return a field's default as YAML writes it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _bound(field: Field[Any]) -> str:
    """Return what a field's value must be, in words."""
    if "valid" in field.metadata:
        return "One of " + ", ".join(f"``{value}``" for value in field.metadata["valid"]) + "."
    if "minimum" in field.metadata:
        return f"At least {field.metadata['minimum']}."
    return "Positive." if "positive" in field.metadata else ""


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("configuration-keys", ConfigurationKeys)
