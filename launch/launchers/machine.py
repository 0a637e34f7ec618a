"""Look at this machine, for a plan that is pure. No torch."""

from __future__ import annotations

import os
import sys

from .base import Machine
from .local import count_gpus
from .mpi import find_mpirun


def look(kind: str = "local") -> Machine:
    """Return what a plan has to know about this machine.

    Parameters
    ----------
    kind : str
        ``launcher.kind``: what only one of them needs is not looked for in vain.
    """
    environ = dict(os.environ)
    mpirun = find_mpirun(environ, python=sys.executable) if kind == "mpi" else None
    return Machine(num_gpus=count_gpus(), environ=environ, python=sys.executable, mpirun=mpirun)
