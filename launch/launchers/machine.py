"""Detect what a plan depends on in this machine. No torch."""

from __future__ import annotations

import os
import sys

from .base import Machine
from .local import count_gpus
from .mpi import find_mpirun


def detect_machine(kind: str = "local") -> Machine:
    """Return this machine as a plan sees it.

    Parameters
    ----------
    kind : str
        ``launcher.kind``: mpirun, which has to be started to know its family, is only looked for with ``mpi``.
    """
    environ = dict(os.environ)
    mpirun = find_mpirun(environ, python=sys.executable) if kind == "mpi" else None
    return Machine(num_gpus=count_gpus(), environ=environ, python=sys.executable, mpirun=mpirun)
