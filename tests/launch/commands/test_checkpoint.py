"""``anemoi-dist checkpoint``: what it prints, what it returns, and that reading needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.saved import example_tensors, save_tensors
from support.saving import save

from anemoi_dist.checkpoint.fsspec_store import FsspecStore
from anemoi_dist.checkpoint.manifest import HASH_BLOCK_BYTES, MANIFEST_FILE
from anemoi_dist.checkpoint.ranks import SingleRank
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.errors import ExitCode
from anemoi_dist.launch import cli
from anemoi_dist.launch.commands.checkpoint import DIFFERENT
from anemoi_dist.run.directory import RunDirectory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the root of one run ``first`` with the steps 5 and 10, which differ in one parameter."""
    for step in (5, 10):
        tensors = example_tensors()
        tensors["net.bias", "param"] = tensors["net.bias", "param"] + step
        save_tensors(tmp_path / "first" / "checkpoints", tensors, step=step)
    return tmp_path


def run(root: Path, *arguments: str) -> int:
    return cli.main(["checkpoint", *arguments, "--root", str(root)])


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_list_says_what_is_whole_and_why_not(root: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoints = root / "first" / "checkpoints"
    with (checkpoints / "step-00000010" / "rank-00000.safetensors").open("ab") as file:
        file.write(b"x")
    (checkpoints / "step-00000020").mkdir()
    assert run(root, "list", "first", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [20, 10, 5]
    assert "no readable manifest" in rows[0]["error"] and "the manifest says" in rows[1]["error"]
    assert rows[2]["error"] is None and rows[2]["engine"] == "toy" and rows[2]["size_bytes"] > 500
    assert run(root, "list", str(root / "first")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[3].endswith("whole")


def test_show_counts_by_kind(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(root, "show", "first", "--json", "--tensors") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 10 and facts["world_size"] == 1 and facts["num_tensors"] == 5
    assert facts["kinds"]["param"] == {"tensors": 2, "size_bytes": 7 * 5 * 4 + 5 * 2, "dtypes": ["BF16", "F32"]}
    assert {"fqn": "net.weight", "kind": "step", "shape": [], "dtype": "F32"} in facts["tensors"]
    assert run(root, "show", "first@5", "--tensors") == 0
    text = capsys.readouterr().out
    assert "step          5\n" in text and "net.weight  exp_avg_sq  (7, 5)  F32\n" in text


def test_the_newest_with_a_manifest_is_shown(root: Path, capsys: pytest.CaptureFixture) -> None:
    flip(root / "first" / "checkpoints" / "step-00000010" / MANIFEST_FILE, 40)
    assert run(root, "show", "first", "--json") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["step"] == 5 and "step-00000010 is passed over" in output.err


def test_verify_names_every_damaged_region(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    numel = 5 * HASH_BLOCK_BYTES // 4 + 10
    folder = save_tensors(tmp_path / "first" / "checkpoints", {("w", "param"): torch.arange(numel).float()})
    assert run(tmp_path, "verify", "first") == 0
    assert "every byte of 20.0 MiB in 2 files" in capsys.readouterr().out
    file = folder / "rank-00000.safetensors"
    size = file.stat().st_size
    for position in (HASH_BLOCK_BYTES + 1, 2 * HASH_BLOCK_BYTES + 1, size - 1):
        flip(file, position)
    flip(folder / "trainer.json")
    (folder / "evil.pkl").write_bytes(b"")
    assert run(tmp_path, "verify", str(folder)) == ExitCode.NO_CHECKPOINT
    name, block = folder.name, HASH_BLOCK_BYTES
    assert set(capsys.readouterr().out.splitlines()) == {
        f"{name}: damaged: rank-00000.safetensors: bytes {block} to {3 * block}: not what was saved",
        f"{name}: damaged: rank-00000.safetensors: bytes {5 * block} to {size}: not what was saved",
        f"{name}: damaged: trainer.json: bytes 0 to {(folder / 'trainer.json').stat().st_size}: not what was saved",
        f"{name}: note: evil.pkl is not part of the checkpoint, and is never read",
    }


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.unlink(), "cannot be opened (No such file or directory)"),
        (lambda f: f.write_bytes(f.read_bytes()[:-3]), "missing"),
        (lambda f: f.write_bytes(f.read_bytes() * 2), "appended after it was saved"),
        (lambda f: f.write_bytes((f.parents[1] / "step-00000005" / f.name).read_bytes()), "not what was saved"),
    ],
)
def test_verify_finds_all_checkpoints_of_a_run(root: Path, capsys: pytest.CaptureFixture, damage, said: str) -> None:
    damage(root / "first" / "checkpoints" / "step-00000010" / "rank-00000.safetensors")
    assert run(root, "verify", "first") == ExitCode.NO_CHECKPOINT
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step-00000010: damaged: rank-00000.safetensors: bytes ") and first.endswith(said)
    assert second.startswith("step-00000005: every byte")
    assert run(root, "verify", "first", "--step", "5") == 0
    assert run(root, "verify", "first@10") == ExitCode.NO_CHECKPOINT


def test_diff_says_what_differs(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(root, "diff", "first@5", "first") == DIFFERENT
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("net.bias param: 5 of 5 elements differ, by at most ")
    assert lines[3:] == ["4 of 5 tensors are equal, 1 differ"]
    assert run(root, "diff", "first@5", str(root / "first" / "checkpoints" / "step-00000005")) == 0
    assert "5 of 5 tensors are equal" in capsys.readouterr().out


def test_export_of_one_step(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert run(root, "export", "first", str(out), "--step", "5", "--dtype", "F16") == 0
    expected = (example_tensors()["net.bias", "param"] + 5).to(torch.float16)
    assert torch.equal(load_file(out)["net.bias"], expected)
    assert run(root, "export", "first", str(out)) == ExitCode.CONFIGURATION
    assert run(root, "export", "first", str(out), "--force") == 0
    assert load_file(out)["net.bias"].dtype == torch.bfloat16


def test_what_is_not_there_is_named(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(root, "show", "frist") == ExitCode.CONFIGURATION
    assert "nearest: first" in capsys.readouterr().err
    assert run(root, "show", "first@7") == ExitCode.NO_CHECKPOINT
    assert "no checkpoint of step 7; it has 10, 5" in capsys.readouterr().err
    assert run(root, "show", "first@5", "--step", "10") == ExitCode.CONFIGURATION
    (root / "empty" / "checkpoints").mkdir(parents=True)
    assert run(root, "verify", "empty") == ExitCode.NO_CHECKPOINT


def test_reading_needs_no_torch(root: Path, tmp_path: Path) -> None:
    commands = [
        ["list", "first"],
        ["show", "first", "--tensors"],
        ["verify", "first"],
        ["diff", "first@5", "first@10"],
        ["export", "first", str(tmp_path / "w.safetensors"), "--dtype", "BF16"],
    ]
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom anemoi_dist.launch.cli import main\n"
        f"codes = [main(['checkpoint', *c, '--root', {str(root)!r}]) for c in {commands!r}]\n"
        "assert codes == [0, 0, 0, 1, 0], codes\n"
        "assert sys.modules['torch'] is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "w.safetensors")["net.bias"], example_tensors()["net.bias", "param"] + 10)


def test_checkpoints_in_another_store(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = FsspecStore(f"file://{tmp_path}/bucket/away")
    for step in (1, 2):
        values = torch.full((4,), float(step))
        save(
            store,
            [Shard("w", "param", (4,), 0, values)],
            world=SingleRank(),
            step=step,
        )
    RunDirectory(root / "away").create()
    (root / "away" / "config.yaml").write_text(f"checkpoint: {{url: 'file://{tmp_path}/bucket'}}\n")
    assert run(root, "list", "away", "--json") == 0
    assert [(row["step"], row["error"]) for row in json.loads(capsys.readouterr().out)] == [(2, None), (1, None)]
    assert run(root, "verify", "away") == 0
    assert run(root, "diff", "away@1", "away@2") == DIFFERENT
    assert "4 of 4 elements differ, by at most 1" in capsys.readouterr().out
    assert run(root, "export", "away", str(tmp_path / "w.safetensors")) == 0
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.full((4,), 2.0))
    torch.save({"w": torch.ones(4)}, tmp_path / "w.pt")
    assert (
        cli.main(["checkpoint", "import", str(tmp_path / "w.pt"), "--run", "away", "--step", "3", "--root", str(root)])
        == 0
    )
    assert store.steps() == [3, 2, 1]
    [file] = (tmp_path / "bucket" / "away" / "step-00000001").glob("*/rank-00000.safetensors")
    flip(file)
    capsys.readouterr()
    assert run(root, "verify", "away@1") == ExitCode.NO_CHECKPOINT
    assert "step-00000001: damaged: rank-00000.safetensors: bytes 0 to " in capsys.readouterr().out
