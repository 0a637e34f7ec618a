"""Sphinx configuration. Build: ``.venv/bin/python -m sphinx -W -b html docs docs/_build``."""

from __future__ import annotations

import anemoi_dist

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
