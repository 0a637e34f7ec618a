"""Differences between two checkpoints are all found, counted and measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.saved import example_tensors, save_tensors

from anemoi_dist.checkpoint.arrays import CHUNK_NUMEL, to_dtype, to_float
from anemoi_dist.checkpoint.compare import Difference, differences
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import CheckpointError


def compare(tmp_path: Path, a: dict, b: dict) -> dict[tuple[str, str, str], Difference]:
    first = SavedCheckpoint(save_tensors(tmp_path / "a", a))
    second = SavedCheckpoint(save_tensors(tmp_path / "b", b))
    return {(d.fqn, d.kind, d.what): d for d in differences(first, second)}


def test_equal_checkpoints_have_no_difference(tmp_path: Path) -> None:
    tensors = example_tensors() | {("nan", "param"): torch.tensor([math.nan, math.inf, -0.0])}
    assert compare(tmp_path, tensors, tensors) == {}


def test_each_kind_of_difference(tmp_path: Path) -> None:
    a, b = example_tensors(), example_tensors()
    b["net.weight", "param"] = b["net.weight", "param"].clone()
    b["net.weight", "param"][6, 4] += 0.25
    b["net.weight", "param"][0, 1] -= 2.0
    del a["net.calls", "buffer"]
    del b["net.weight", "step"]
    b["net.weight", "exp_avg_sq"] = b["net.weight", "exp_avg_sq"].T.contiguous()
    b["net.bias", "param"] = a["net.bias", "param"].float()
    found = compare(tmp_path, a, b)
    assert set(found) == {
        ("net.weight", "param", "values"),
        ("net.calls", "buffer", "only_in_b"),
        ("net.weight", "step", "only_in_a"),
        ("net.weight", "exp_avg_sq", "shape"),
        ("net.bias", "param", "dtype"),
    }
    values = found["net.weight", "param", "values"]
    assert values.count == 2 and values.max_abs == pytest.approx(2.0)
    assert "(7, 5) in A, (5, 7) in B" in found["net.weight", "exp_avg_sq", "shape"].text


def test_values_of_another_type_are_compared_as_numbers(tmp_path: Path) -> None:
    values = torch.randn(100)
    found = compare(tmp_path, {("w", "param"): values}, {("w", "param"): values.bfloat16()})
    expected = (values - values.bfloat16().float()).abs()
    assert found["w", "param", "values"].count == int((expected > 0).sum())
    assert found["w", "param", "values"].max_abs == pytest.approx(float(expected.max()))


def test_bits_count_not_numbers(tmp_path: Path) -> None:
    a, b = torch.tensor([0.0, math.nan, 1.0]), torch.tensor([-0.0, math.nan, math.nan])
    found = compare(tmp_path, {("w", "param"): a, ("v", "param"): a[:1]}, {("w", "param"): b, ("v", "param"): b[:1]})
    assert found["w", "param", "values"].count == 2 and math.isnan(found["w", "param", "values"].max_abs)
    assert found["v", "param", "values"].count == 1 and found["v", "param", "values"].max_abs == 0.0


def test_the_last_element_of_the_last_piece_is_compared(tmp_path: Path) -> None:
    values = torch.arange(2 * CHUNK_NUMEL + 7, dtype=torch.int32)
    changed = values.clone()
    changed[-1] += 5
    found = compare(tmp_path, {("w", "buffer"): values}, {("w", "buffer"): changed})
    assert [(d.count, d.max_abs) for d in found.values()] == [(1, 5.0)]


def test_damage_is_met_not_compared(tmp_path: Path) -> None:
    a = save_tensors(tmp_path / "a", example_tensors())
    b = save_tensors(tmp_path / "b", example_tensors())
    file = b / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        list(differences(SavedCheckpoint(a), SavedCheckpoint(b)))


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1e-45, 1.0 + 2**-8, 1.0 + 3 * 2**-8]
    values = torch.cat([torch.tensor(special), torch.randn(10_000) * 10 ** (torch.randn(10_000) * 10)])
    bits = torch.tensor(to_dtype(values.numpy(), "F32", "BF16").astype(np.int32), dtype=torch.int32)
    ours = bits.to(torch.int16).view(torch.bfloat16)
    theirs = values.bfloat16()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()].view(torch.int16), theirs[~ours.isnan()].view(torch.int16))
    assert np.array_equal(to_float(theirs.view(torch.uint16).numpy(), "BF16"), theirs.float().numpy(), equal_nan=True)
