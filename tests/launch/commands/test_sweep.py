from __future__ import annotations

import pytest

from anemoi_dist.errors import ConfigError
from anemoi_dist.launch.commands.sweep import MAX_RUNS, expand


def test_every_combination_is_a_run() -> None:
    runs = expand(
        ["engine=zero1,zero2", "run.seed=range(1,4)", "training.lr.rate=choice(1e-4,3e-4)", "data.forcing=[a,b]"]
    )
    assert len(runs) == 12
    assert runs[0] == ["engine=zero1", "run.seed=1", "training.lr.rate=0.0001", "data.forcing=[a,b]"]
    assert runs[-1] == ["engine=zero2", "run.seed=3", "training.lr.rate=0.0003", "data.forcing=[a,b]"]
    assert len({tuple(run) for run in runs}) == 12


def test_commas_in_quotes_are_no_sweep() -> None:
    assert expand(["run.id='a,b'", "run.seed=1,2"]) == [["run.id='a,b'", f"run.seed={seed}"] for seed in (1, 2)]


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["run.seed=1"], "sweeps nothing"),
        ([], "sweeps nothing"),
        (["run.seed=interval(0,1)"], "cannot be swept"),
        (["engine=glob(*)"], "cannot be swept"),
        (["run.seed=range(0,2000)"], f"more than {MAX_RUNS}"),
        (["run.seed=range(0,100)", "run.id=range(0,100)"], f"more than {MAX_RUNS}"),
        (["run.seed=[1"], "cannot be swept"),
    ],
)
def test_what_is_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        expand(overrides)
