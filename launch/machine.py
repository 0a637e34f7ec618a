"""Look at this machine, for a plan that is pure. No torch."""

from __future__ import annotations

import os
import sys

from .local import count_gpus
from .plan import Machine


def look() -> Machine:
    """Return what a plan has to know about this machine."""
    return Machine(num_gpus=count_gpus(), environ=dict(os.environ), python=sys.executable)
