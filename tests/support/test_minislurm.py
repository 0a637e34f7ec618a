"""The cluster that the tests of SLURM jobs run on is one, in both of its modes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from support.minislurm import MiniSlurm, default_mode, missing_programs

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason="no SLURM here")


@pytest.mark.parametrize("mode", ["uts", "multi"])
def test_jobs_run_on_several_nodes_and_nothing_is_left(mode: str) -> None:
    if mode == "uts" and default_mode() != "uts":
        pytest.skip("only root may give a process its own host name")
    folder = Path(tempfile.mkdtemp(prefix="minislurm-", dir="/tmp"))
    cluster = MiniSlurm(folder, nodes=2, mode=mode)
    try:
        cluster.start()
        printed = cluster.run(
            "srun", "-N2", "--gpus-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_STEP_GPUS"
        )
        assert sorted(printed.splitlines()) == ["node1 0,1", "node2 0,1"]
        cluster.run("sbatch", "-N2", "--output=/dev/null", "--wrap", "sleep 60 & srun sleep 60")
        assert cluster.processes()
    finally:
        cluster.stop()
    assert not cluster.processes()
    shutil.rmtree(folder)
