"""Stochastic rounding of EMA states to bfloat16, the same on any number of ranks.

One step changes an EMA state by about ``1 - beta`` of it, and bfloat16 has 8 bits: rounded to nearest, what is smaller
than half a unit in the last place is lost at every step, and the EMA state stands still. Rounded up with a probability
that is the part cut off, it moves as it should on average.

The random bits come from no generator: they are a hash of (seed, parameter, element, step, EMA state). So they don't
depend on how a parameter is cut over ranks or on which implementation rounds, and a run that is resumed continues with
those of its step. The hash is murmur3's finaliser (Austin Appleby, public domain) on the element's number, with two
32-bit keys from the rest. One word of 32 bits serves two EMA states: 16 bits are what rounding to bfloat16 cuts off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from anemoi_dist.errors import ConfigError

_MASK = 0xFFFFFFFF


class ElementRange(NamedTuple):
    """Elements of one parameter, as they lie in a flattened tensor that holds some of one or more parameters.

    Attributes
    ----------
    name : str
        Name of the parameter; the same on every rank.
    offset : int
        First element of the range in the flattened tensor.
    start, numel : int
        The range in the flattened parameter.
    """

    name: str
    offset: int
    start: int
    numel: int


def range_table(ranges: Iterable[ElementRange], *, seed: int) -> Tensor:
    """Return ``ranges`` as the table that the implementations read.

    Returns
    -------
    Tensor
        Shape (n, 4), int64, by offset: first element of the range in the tensor, number of that element in its
        parameter, two 32-bit words that stand for parameter and seed. A range ends where the next one begins; the first
        begins at 0. Elements are numbered in 32 bits: a parameter of more than 2^32 has several ranges.
    """
    rows = []
    for name, offset, start, numel in sorted(ranges, key=lambda r: r.offset):
        end = start + numel
        while start < end:
            high = start >> 32  # hashed with the name, so that elements 0 and 2^32 do not share their random bits
            digest = hashlib.blake2b(f"{seed}/{high}/{name}".encode(), digest_size=8).digest()
            words = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
            rows.append([offset, start & _MASK, *words])
            count = min(end, (high + 1) << 32) - start
            start, offset = start + count, offset + count
    rows = rows or [[0, 0, 0, 0]]
    # Padding before the first range is numbered on from it backwards: no kernel has to treat it apart.
    rows[0][:2] = [0, rows[0][1] - rows[0][0]]
    return torch.tensor(rows, dtype=torch.int64)


def whole_range(p: Tensor, name: str) -> ElementRange:
    """Return the range of a parameter that no engine has set: all of it, or this rank's rows of a DTensor.

    Raises
    ------
    ConfigError
        A DTensor's local elements are no range of the whole.
    """
    if not isinstance(p, DTensor):
        return ElementRange(name, 0, 0, p.numel())
    # By type: a strided shard is one too, and no range.
    if not all(type(x) in (Shard, Replicate) and x in (Shard(0), Replicate()) for x in p.placements):
        rule = "bfloat16 states need parameters that are cut along their first dimension"
        raise ConfigError("state_dtype", str(p.placements), rule, fix="state_dtype=fp32")
    _, begin = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    rows = p.shape[0] if p.dim() else 1
    return ElementRange(name, 0, begin[0] * (p.numel() // rows) if p.dim() and rows else 0, p.to_local().numel())


def random_words(element_ranges: Tensor, numel: int, step: Any, *, second: bool = False) -> Tensor:
    """Return 32 random bits for each element of a tensor.

    Parameters
    ----------
    element_ranges : Tensor
        Table of :func:`range_table`, on the tensor's device.
    numel : int
        Elements of the tensor.
    step : Any
        Number of the update, from 1; a number or a 0-d tensor.
    second : bool
        Return another 32 bits of each element.

    Returns
    -------
    Tensor
        Shape (numel,), int64.
    """
    mixed = _mix(step.to(torch.int64) & _MASK if isinstance(step, Tensor) else int(step) & _MASK)
    positions = torch.arange(numel, device=element_ranges.device)
    begin, start, *salts = element_ranges.unbind(1)
    if second:
        salts.reverse()
    # A gather for each element: this is the definition, the kernels have a loop over ranges.
    index = torch.searchsorted(begin.contiguous(), positions, right=True) - 1
    key, other = (_mix(salt ^ mixed)[index] for salt in salts)
    x = (positions - begin[index] + start[index] + key) & _MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = ((x ^ (x >> 13)) + other) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, up in magnitude where ``bits`` (16 of them) carry over what is cut off."""
    rounded = (x.view(torch.int32) + bits.to(torch.int32).view_as(x)) & ~0xFFFF
    # Adding to what is not a number could make one of it.
    return torch.where(x.isnan(), x, rounded.view(torch.float32)).to(torch.bfloat16)


def store(
    ema_states: Iterable[Tensor | None], values: Iterable[Tensor | None], element_ranges: Tensor | None, step: Any
) -> None:
    """Write new float32 values to the EMA states (fast, slow, square) that are not those tensors themselves."""
    fast, slow, square = zip(ema_states, values, strict=True)
    for pairs, second in (((fast, square), False), ((slow,), True)):
        if all(state is value for state, value in pairs):
            continue
        assert element_ranges is not None, "bfloat16 EMA states are rounded by where their elements lie"
        words = random_words(element_ranges, next(x.numel() for x, _ in pairs if x is not None), step, second=second)
        for (state, value), shift in zip(pairs, (0, 16), strict=False):
            if state is not None and state is not value:
                assert value is not None
                state.copy_(round_to_bfloat16(value, (words >> shift) & 0xFFFF))


def _mix(x: Any) -> Any:
    """Murmur3's finaliser of 32 bits, for numbers and int64 tensors."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)
