"""``anemoi-dist report``: write a run's HTML report."""

from __future__ import annotations

import argparse

from anemoi_dist.errors import ExitCode
from anemoi_dist.report.page import write_report

from .arguments import locate_run


def run(options: argparse.Namespace) -> int:
    """Write the report and print where."""
    print(write_report(locate_run(options.run, options.root)))
    return ExitCode.FINISHED
