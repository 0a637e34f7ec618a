from __future__ import annotations

import os
import subprocess
import sys

from anemoi_dist.process.parent_death import process_started


def test_a_process_is_known_by_its_start():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_started(process.pid)
    assert started is not None and started == process_started(process.pid)
    assert started >= process_started(os.getpid())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_started(process.pid) is None, "a zombie runs nothing"
    process.wait()
    assert process_started(process.pid) is None
