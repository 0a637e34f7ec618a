"""``anemoi-dist config``: print the resolved configuration and where each value came from."""

from __future__ import annotations

import argparse

from anemoi_dist.config.provenance import annotated_yaml
from anemoi_dist.errors import ExitCode

from .arguments import compose_options


def run(options: argparse.Namespace) -> int:
    """Print the configuration as YAML."""
    composed = compose_options(options)
    print(annotated_yaml(composed.container(), composed.provenance), end="")
    return ExitCode.FINISHED
