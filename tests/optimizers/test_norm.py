"""The squared norm of gradients: digits that a sum in float32 loses, in C and in torch."""

import math

import pytest
import torch

from anemoi_dist.optimizers import native, norm
from anemoi_dist.optimizers.norm import squared_norms, sum_of_squares

NEEDS_C = pytest.mark.skipif(native.library() is None, reason="the package was built without a compiler")
#: Whole chunks and whole groups of lanes, one more and one less, a single element and none.
SHAPES = ((3 * native.CHUNK,), (700, 11), (native.CHUNK + 1,), (native.CHUNK - 1,), (63,), (64,), (65,), (1,), (0, 5))


def gradients(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in SHAPES]


def exact(tensors):
    return math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist())


@pytest.fixture(params=[pytest.param("c", marks=NEEDS_C), "torch"])
def code(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "can_square", lambda tensor: False)
        monkeypatch.setattr(norm, "_CHUNK_NUMEL", 1000)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_sum_of_squares(code, dtype):
    tensors = gradients(dtype)
    result = squared_norms(tensors)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([exact([tensor]) for tensor in tensors], rel=1e-5)
    assert [float(squared_norms([tensor])) for tensor in tensors] == result.tolist(), "whatever is beside it"


@pytest.mark.parametrize("num_known", [0, 1, 700, 2000])
def test_what_is_known_already_changes_no_bit_of_the_sum(code, num_known):
    generator = torch.Generator().manual_seed(0)
    pieces = dict(enumerate((torch.randn(2000, generator=generator) * 1000).exp2().clamp(1e-3, 1e9).split(1)))
    known = {key: squared_norms([pieces[key]]) for key in list(reversed(pieces))[:num_known]}
    expected = torch.cat([squared_norms([piece]) for piece in pieces.values()]).sum()
    assert float(sum_of_squares(pieces, known)) == float(expected)
    assert float(sum_of_squares(dict(reversed(pieces.items())), known)) != float(expected), "another order would show"


@NEEDS_C
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_in_c_no_digit_is_lost_and_nothing_overflows(dtype, scale):
    tensors = gradients(dtype, scale)
    assert native.squared_norms(tensors).tolist() == pytest.approx([exact([t]) for t in tensors], rel=1e-14)


@NEEDS_C
def test_in_c_it_does_not_depend_on_threads_nor_on_where_the_gradients_lie():
    tensors = gradients(torch.float32)
    before = torch.get_num_threads()
    sums = []
    try:
        for num_threads, shift in ((1, 0), (2, 0), (3, 1)):
            torch.set_num_threads(num_threads)
            moved = [torch.cat([torch.zeros(shift), x.flatten()])[shift:] for x in tensors]
            sums.append(native.squared_norms(moved).tolist())
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_what_is_not_finite_is_seen(code, value, place):
    tensors = gradients(torch.float32)
    tensors[1].view(-1)[place] = value
    assert [place for place, square in enumerate(squared_norms(tensors)) if not square.isfinite()] == [1]


def test_tensors_of_several_types(code):
    tensors = [torch.full((3,), 2.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    assert squared_norms([tensors[0] * 2, *tensors]).tolist() == pytest.approx([48.0, 12.0, 12.0, 12.0])


def test_a_number_does_not_depend_on_its_neighbours(code):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(100_003, generator=generator)
    alone = float(squared_norms([first]))
    for other in (torch.randn(50, 40, generator=generator).t(), torch.ones(3, dtype=torch.float64)):
        both = squared_norms([first, other])
        assert float(both[0]) == alone and float(both[1]) == float(squared_norms([other]))


def test_a_gradient_that_is_not_contiguous(code):
    tensor = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).t()[::2]
    assert float(squared_norms([tensor])) == pytest.approx(exact([tensor]), rel=1e-6)
