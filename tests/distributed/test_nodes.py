"""Two nodes by hand, with the very commands of docs/how-to/several-nodes.rst, on networks that resolve no host name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anemoi_dist.run.events import read_events

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "several-nodes.rst"
SMALL = [
    "model.hidden_channels=6",
    "model.dilations=[1]",
    "data.num_workers=1",
    "training.max_steps=4",
    "training.lr.warmup=1",
    "validation.lead_steps=[1]",
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Two namespaces that see each other by ``eth0``, by the addresses of the page."""
    names = {f"10.0.0.{number}": f"adt-{os.getpid()}-{number}" for number in (1, 2)}
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        first, second = names.values()
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for address, name in names.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def documented(address: str) -> list[str]:
    """Return the command of the page for the node with this address."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = re.findall(rf"^ +(GLOO.* torchrun .*--local-addr={re.escape(address)} .*)$", text, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.slow
def test_the_documented_commands_train_on_two_nodes(nodes: dict[str, str], tmp_path: Path):
    agents = []
    for address, name in nodes.items():
        words = documented(address)
        at = words.index("torchrun")
        words[at : at + 1] = [sys.executable, "-m", "torch.distributed.run"]
        command = " ".join(words)
        assert "--nproc-per-node=4" in command and "run.root=/shared/runs" in command
        words = command.replace("--nproc-per-node=4", "--nproc-per-node=1").split()
        words = [f"run.root={tmp_path}" if word.startswith("run.root=") else word for word in words]
        agents.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, "env", "CUDA_VISIBLE_DEVICES=", *words, *SMALL],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        ended = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()  # the ranks end with it
    assert [agent.returncode for agent in agents] == [0, 0], ended
    events = read_events(tmp_path / "first" / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"][-1] == 4
    assert next(e for e in events if e["event"] == "start")["world_size"] == 2
