"""The kernel of :mod:`anemoi_dist.optimizers.gpu`, in a file of its own: importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def _lerp(start, end, weight):
    # As torch: from .5 on it starts at the other end.
    near = tl.abs(weight) < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def ademamix_kernel(
    p_ptr,
    g_ptr,
    fast_ptr,
    slow_ptr,
    square_ptr,
    copy_ptr,
    numbers_ptr,
    numel,
    has_fast: tl.constexpr,
    has_copy: tl.constexpr,
    block: tl.constexpr,
):
    """Update ``block`` elements; ``numbers_ptr``: the fields of UpdateScalars, in their order."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block).to(tl.int64)
    mask = offsets < numel
    lr = tl.load(numbers_ptr)
    weight_decay = tl.load(numbers_ptr + 1)
    eps = tl.load(numbers_ptr + 2)
    weight_slow = tl.load(numbers_ptr + 4)
    weight_sq = tl.load(numbers_ptr + 5)
    alpha = tl.load(numbers_ptr + 6)
    inverse_fast = tl.load(numbers_ptr + 7)
    inverse_sq = tl.load(numbers_ptr + 8)
    grad_factor = tl.load(numbers_ptr + 9)

    p = tl.load(p_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_factor
    slow = _lerp(tl.load(slow_ptr + offsets, mask=mask, other=0.0), g, weight_slow)
    square = _lerp(tl.load(square_ptr + offsets, mask=mask, other=0.0), g * g, weight_sq)
    first = g
    if has_fast:
        first = _lerp(tl.load(fast_ptr + offsets, mask=mask, other=0.0), g, tl.load(numbers_ptr + 3))
        tl.store(fast_ptr + offsets, first, mask=mask)
    tl.store(slow_ptr + offsets, slow, mask=mask)
    tl.store(square_ptr + offsets, square, mask=mask)

    denominator = tl.sqrt_rn(square) * inverse_sq + eps
    update = tl.div_rn(tl.fma(slow, alpha, first * inverse_fast), denominator)
    p = tl.fma(tl.fma(p, weight_decay, update), -lr, p)
    tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=mask)
    if has_copy:
        tl.store(copy_ptr + offsets, p.to(copy_ptr.dtype.element_ty), mask=mask)
