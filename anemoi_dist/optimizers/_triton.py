"""The kernel of :mod:`anemoi_dist.optimizers.gpu`, in a file of its own: importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def _lerp(start, end, weight):
    # As torch: from .5 on it starts at the other end.
    near = tl.abs(weight) < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _words(index, key, other):
    # rounding.random_words
    x = index + key
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = ((x ^ (x >> 13)) + other) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, bits):
    # Up in magnitude where the 16 bits carry over what bfloat16 cuts off; what is left converts without rounding.
    cut = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return tl.where(x == x, cut.to(tl.float32, bitcast=True), x)


@triton.jit
def _random_words(offsets, numbers_ptr, ranges_ptr, num_ranges, block: tl.constexpr):
    # rounding.random_words, first and second, for the elements of this program.
    step = tl.load(numbers_ptr + 9).to(tl.uint32) + (tl.load(numbers_ptr + 10).to(tl.uint32) << 16)
    mixed = _mix(step)
    begin = tl.program_id(0).to(tl.int64) * block
    index = 0
    past = num_ranges
    while past - index > 1:  # the last range that begins with this block or before, by bisection
        middle = (index + past) // 2
        if tl.load(ranges_ptr + 4 * middle) <= begin:
            index = middle
        else:
            past = middle
    words = tl.zeros((block,), tl.uint32)
    others = tl.zeros((block,), tl.uint32)
    # Each range that reaches into the block overwrites what the one before it has left beyond its end.
    range_begin = begin
    while range_begin < begin + block:
        row = ranges_ptr + 4 * index
        own_begin = tl.load(row)
        element = (offsets - own_begin + tl.load(row + 1)).to(tl.uint32)
        key = _mix(tl.load(row + 2).to(tl.uint32) ^ mixed)
        other_key = _mix(tl.load(row + 3).to(tl.uint32) ^ mixed)
        inside = offsets >= own_begin
        words = tl.where(inside, _words(element, key, other_key), words)
        others = tl.where(inside, _words(element, other_key, key), others)
        index += 1
        range_begin = tl.load(ranges_ptr + 4 * index, mask=index < num_ranges, other=begin + block)
    return words, others


@triton.jit
def ademamix_kernel(
    p_ptr,
    g_ptr,
    fast_ptr,
    slow_ptr,
    square_ptr,
    copy_ptr,
    numbers_ptr,
    ranges_ptr,
    numel,
    num_ranges,
    has_fast: tl.constexpr,
    has_copy: tl.constexpr,
    is_rounded: tl.constexpr,
    block: tl.constexpr,
):
    """Update ``block`` elements. ``numbers_ptr``: UpdateScalars in order; ``ranges_ptr``: rounding.range_table."""
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
    grad_factor = tl.load(numbers_ptr + 11)

    p = tl.load(p_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_factor
    slow = _lerp(tl.load(slow_ptr + offsets, mask=mask, other=0.0).to(tl.float32), g, weight_slow)
    square = _lerp(tl.load(square_ptr + offsets, mask=mask, other=0.0).to(tl.float32), g * g, weight_sq)
    first = g
    if has_fast:
        fast = tl.load(fast_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        first = _lerp(fast, g, tl.load(numbers_ptr + 3))

    kept_fast, kept_slow, kept_square = first, slow, square
    if is_rounded:
        words, others = _random_words(offsets, numbers_ptr, ranges_ptr, num_ranges, block)
        if fast_ptr.dtype.element_ty == tl.bfloat16:
            kept_fast = _rounded(first, words & 0xFFFF)
        if square_ptr.dtype.element_ty == tl.bfloat16:
            kept_square = _rounded(square, words >> 16)
        if slow_ptr.dtype.element_ty == tl.bfloat16:
            kept_slow = _rounded(slow, others & 0xFFFF)
    if has_fast:
        tl.store(fast_ptr + offsets, kept_fast.to(fast_ptr.dtype.element_ty), mask=mask)
    tl.store(slow_ptr + offsets, kept_slow.to(slow_ptr.dtype.element_ty), mask=mask)
    tl.store(square_ptr + offsets, kept_square.to(square_ptr.dtype.element_ty), mask=mask)

    denominator = tl.sqrt_rn(square) * inverse_sq + eps
    update = tl.div_rn(tl.fma(slow, alpha, first * inverse_fast), denominator)
    p = tl.fma(tl.fma(p, weight_decay, update), -lr, p)
    tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=mask)
    if has_copy:
        tl.store(copy_ptr + offsets, p.to(copy_ptr.dtype.element_ty), mask=mask)
