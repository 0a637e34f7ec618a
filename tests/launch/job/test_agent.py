"""Which of several failed ranks torchrun's agent names as the one that began it."""

from __future__ import annotations

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from anemoi_dist.launch.job.agent import _cause


def failed(code: int, after_s: int) -> ProcessFailure:
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=code, error_file="")
    failure.timestamp = 1000 + after_s
    return failure


@pytest.mark.parametrize(
    ("codes", "rank", "code"),
    [
        ({0: (3, 0), 1: (-15, 0)}, 0, 3),  # 1 was asked to leave before it could answer
        ({0: (-15, 0), 1: (2, 0), 2: (-15, 1)}, 1, 2),
        ({0: (2, 0), 1: (-9, 120)}, 0, 2),  # 1 did not leave and was killed for it
        ({0: (70, 0), 1: (-9, 0)}, 1, -9),  # 0 has lost 1
        ({0: (70, 0), 1: (-11, 1), 2: (-15, 1)}, 1, -11),
        ({0: (70, 3), 1: (6, 0)}, 1, 6),
        ({0: (-15, 1), 1: (-15, 0)}, 1, -15),  # from outside
        ({0: (1, 0)}, 0, 1),
    ],
)
def test_who_began_it(codes: dict[int, tuple[int, int]], rank: int, code: int) -> None:
    failures = {each: failed(*how) for each, how in codes.items()}
    found, failure = _cause(ChildFailedError("train", failures))
    assert (found, failure.exitcode) == (rank, code)
