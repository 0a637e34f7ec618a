"""Exported files hold what the checkpoint holds, appear whole or not at all, and cost little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.saved import example_tensors, save_tensors

from anemoi_dist.checkpoint.export import export
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import CheckpointError, ConfigError


@pytest.fixture
def checkpoint(tmp_path: Path) -> SavedCheckpoint:
    return SavedCheckpoint(save_tensors(tmp_path / "checkpoints", example_tensors()))


def test_weights_and_buffers_under_their_names(checkpoint: SavedCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    export(checkpoint, out, force=False)
    loaded = load_file(out)
    tensors = example_tensors()
    assert set(loaded) == {"net.weight", "net.bias", "net.calls"}
    assert torch.equal(loaded["net.weight"], tensors["net.weight", "param"])
    assert torch.equal(loaded["net.bias"], tensors["net.bias", "param"]) and loaded["net.bias"].dtype == torch.bfloat16
    assert torch.equal(loaded["net.calls"], tensors["net.calls", "buffer"])
    with safe_open(out, "pt") as file:
        assert file.metadata()["step"] == "10"
    model = torch.nn.Module()
    model.net = torch.nn.Linear(5, 7)
    model.load_state_dict({"net.weight": loaded["net.weight"]}, strict=False)


def test_states_beside_the_weights(checkpoint: SavedCheckpoint, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "all.safetensors", with_optimizer=True, force=False)
    loaded = load_file(tmp_path / "all.safetensors")
    assert torch.equal(loaded["net.weight:exp_avg_sq"], example_tensors()["net.weight", "exp_avg_sq"])
    assert loaded["net.weight:step"].shape == () and loaded["net.weight:step"] == 10
    export(checkpoint, tmp_path / "all.pt", with_optimizer=True, force=False)
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    assert saved["step"] == 10 and set(saved["model"]) == {"net.weight", "net.bias", "net.calls"}
    assert torch.equal(saved["optimizer"]["net.weight"]["exp_avg_sq"], loaded["net.weight:exp_avg_sq"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_averaged_weights(tmp_path: Path, suffix: str) -> None:
    tensors = example_tensors()
    average = tensors["net.weight", "weight_average"] = tensors["net.weight", "param"] / 3
    checkpoint = SavedCheckpoint(save_tensors(tmp_path / "checkpoints", tensors))
    out = tmp_path / f"w{suffix}"
    export(checkpoint, out, averaged=True, dtype="BF16", force=False)
    loaded = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert set(loaded) == {"net.weight", "net.bias", "net.calls"}
    assert torch.equal(loaded["net.weight"], average.bfloat16())
    assert torch.equal(loaded["net.bias"], tensors["net.bias", "param"]), "frozen: there is no average"
    export(checkpoint, out, force=True)
    loaded = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert torch.equal(loaded["net.weight"], tensors["net.weight", "param"]) and len(loaded) == 3


def test_without_averaged_weights(checkpoint: SavedCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--averaged.*has none.*\n.*weight_averaging"):
        export(checkpoint, tmp_path / "w.pt", averaged=True, force=False)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_parameters_in_another_type(checkpoint, tmp_path: Path, dtype: str, torch_dtype, suffix: str) -> None:
    out = tmp_path / f"w{suffix}"
    export(checkpoint, out, dtype=dtype, force=False)
    loaded = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert torch.equal(loaded["net.weight"], example_tensors()["net.weight", "param"].to(torch_dtype))
    assert torch.equal(loaded["net.bias"], example_tensors()["net.bias", "param"].to(torch_dtype))
    assert loaded["net.calls"].dtype == torch.int64


def test_an_existing_file_is_kept_without_force(checkpoint: SavedCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"exists.*\n.*--force"):
        export(checkpoint, out, force=False)
    assert out.read_bytes() == b"mine"
    export(checkpoint, out, force=True)
    assert "net.weight" in load_file(out)
    with pytest.raises(ConfigError, match="must say the format"):
        export(checkpoint, tmp_path / "w.bin", force=False)


def test_damage_leaves_no_file(checkpoint: SavedCheckpoint, tmp_path: Path) -> None:
    file = checkpoint.folder / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "out").mkdir()
    for name in ("w.safetensors", "w.pt"):
        with pytest.raises(CheckpointError, match="is damaged"):
            export(checkpoint, tmp_path / "out" / name, force=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_streaming_never_holds_a_whole_tensor(tmp_path: Path, dtype: str | None) -> None:
    numel = 16 * 1024 * 1024  # 64 MiB each
    tensors = {(f"w{i}", "param"): torch.full((numel,), float(i)) for i in range(2)}
    checkpoint = SavedCheckpoint(save_tensors(tmp_path / "checkpoints", tensors))
    tracemalloc.start()
    try:
        export(checkpoint, tmp_path / "w.safetensors", dtype=dtype, force=False)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * 1024 * 1024
    assert float(load_file(tmp_path / "w.safetensors")["w1"][-1]) == 1.0
