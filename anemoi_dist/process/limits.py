"""Limits that the system sets a process."""

from __future__ import annotations

import resource

from anemoi_dist.errors import PreflightError

#: Files, libraries and pipes of a rank; connections to each other rank: a socket a peer in every process group.
_OWN_FILES, _FILES_A_RANK = 256, 4


def raise_open_files(num_ranks: int) -> None:
    """Raise the limit of open files as far as it goes: every rank is connected to all others.

    Raises
    ------
    PreflightError
        So many ranks need more than the system allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _OWN_FILES + _FILES_A_RANK * num_ranks
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise PreflightError(
            f"{num_ranks} ranks need {needed} open files in each, and this machine allows {hard} (`ulimit -Hn`): raise "
            "nofile in /etc/security/limits.conf, or LimitNOFILE of slurmd"
        )
