"""``state_dtype``: EMA states in bfloat16, rounded by a hash that every implementation computes alike."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from omegaconf import OmegaConf

from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import AdEMAMix, create_optimizer, native, rounding
from anemoi_dist.optimizers.ademamix import EMA_STATES
from anemoi_dist.optimizers.rounding import ElementRange, random_words, range_table, round_to_bfloat16
from anemoi_dist.optimizers.update import ParamTensors, ademamix_update

from .problems import random_problem, run
from .test_implementations import WARM, assert_equal, exact_sqrt, needs_c, scalars_at  # noqa: F401, the fixture

ALL = dict.fromkeys(EMA_STATES, "bf16")
#: Which of m1, m2 and nu are bfloat16.
NARROW = [x for x in itertools.product((False, True), repeat=3) if any(x)]
SIZES = (1, 63, 64, 65, 1000, 16_385, 40_000)


def make_ranges(numel):
    """Two parameters, the second across element 2^32, and padding; for any number of elements."""
    first = min(numel, 530)
    ranges = [ElementRange("a", 3, 7, first)]
    if numel > 600:
        ranges.append(ElementRange("b", 540, 2**32 - 100, numel - 600))
    return range_table(ranges, seed=3)


def make_row(numel, narrow, *, p=torch.float32, g=torch.float32, with_fast=True, with_copy=False):
    generator = torch.Generator().manual_seed(numel)
    m1, m2, nu = (torch.bfloat16 if x else torch.float32 for x in narrow)

    def randn():
        return torch.randn(numel, generator=generator)

    return ParamTensors(
        randn().to(p),
        randn().to(g),
        randn().to(m1) if with_fast else None,
        randn().to(m2),
        randn().square().to(nu),
        torch.empty(numel, dtype=torch.bfloat16) if with_copy else None,
        make_ranges(numel),
    )


def exact_row(numel, narrow):
    """A row whose new EMA states are exact in float32 with betas of .75: only the rounding in question is left."""
    generator = torch.Generator().manual_seed(numel)

    def some(is_narrow):
        x = torch.randint(-256, 257, (numel,), generator=generator) / 256
        return x.bfloat16().to(torch.bfloat16 if is_narrow else torch.float32)

    p, g = some(False), torch.randint(-512, 513, (numel,), generator=generator) / 512
    return ParamTensors(p, g, some(narrow[0]), some(narrow[1]), some(narrow[2]).abs(), None, make_ranges(numel))


# The random bits


def test_bits_do_not_depend_on_how_a_parameter_is_cut():
    whole = random_words(range_table([ElementRange("a", 0, 0, 5000)], seed=1), 5000, 9)
    element_ranges = [ElementRange("b", 0, 30, 10), ElementRange("a", 10, 4000, 1000), ElementRange("c", 1010, 0, 4)]
    part = random_words(range_table(element_ranges, seed=1), 1014, 9)
    assert torch.equal(part[10:1010], whole[4000:])
    for other in (
        random_words(range_table([ElementRange("b", 0, 0, 5000)], seed=1), 5000, 9),
        random_words(range_table([ElementRange("a", 0, 0, 5000)], seed=2), 5000, 9),
        random_words(range_table([ElementRange("a", 0, 0, 5000)], seed=1), 5000, 10),
        random_words(range_table([ElementRange("a", 0, 2**32, 5000)], seed=1), 5000, 9),
        random_words(range_table([ElementRange("a", 0, 0, 5000)], seed=1), 5000, 9, second=True),
    ):
        assert (other == whole).sum() <= 1


def test_beyond_2_to_the_32_elements_go_on_under_another_key():
    near = range_table([ElementRange("a", 0, 2**32 - 5, 10)], seed=1)
    assert near[:, :2].tolist() == [[0, 2**32 - 5], [5, 0]]
    after = range_table([ElementRange("a", 0, 2**32, 5)], seed=1)
    assert torch.equal(random_words(near, 10, 3)[5:], random_words(after, 5, 3))


@pytest.mark.parametrize("second", [False, True])
def test_bits_look_random(second):
    """Means, variances and correlations of the 16-bit halves, along elements, steps and between the halves."""
    table, steps, numel = range_table([ElementRange("a", 0, 0, 20_000)], seed=0), 50, 20_000
    words = torch.stack([random_words(table, numel, step, second=second) for step in range(1, steps + 1)])
    assert words.min() >= 0 and words.max() < 2**32
    low, high = ((x.double() + 0.5) / 65536 for x in (words & 0xFFFF, words >> 16))
    sigma = (12 * words.numel()) ** -0.5
    for half in (low, high):
        assert abs(half.mean() - 0.5) < 4 * sigma
        assert half.mean(0).sub(0.5).square().mean() == pytest.approx(1 / 12 / steps, rel=0.05)
        assert half.mean(1).sub(0.5).abs().max() < 5 * (12 * numel) ** -0.5
    others = random_words(table, numel, 1, second=not second)
    for x, y in (
        (low, high),
        (low[:, 1:], low[:, :-1]),
        (high[1:], high[:-1]),
        (low[1:, 1:], low[:-1, :-1]),
        (low[0], (others & 0xFFFF).double() / 65536),
    ):
        assert abs(((x - 0.5) * (y - 0.5)).mean() * 12) < 4 * x.numel() ** -0.5
    counts = torch.stack([(words >> shift & 0xFF).flatten().bincount(minlength=256) for shift in (0, 8, 16, 24)])
    expected = words.numel() / 256
    chi_square = ((counts - expected).square() / expected).sum(1)
    assert chi_square.max() < 255 + 5 * (2 * 255) ** 0.5


def test_rounding_is_exact_on_average_and_hands_on_what_is_not_finite():
    bits = torch.arange(65536)
    for value in (1.003, -0.37, 1e-30, 3.0e38):
        x = torch.full((65536,), value)
        rounded = round_to_bfloat16(x, bits)
        assert len(rounded.unique()) == 2
        assert float(rounded.double().mean()) == pytest.approx(float(x[0]), rel=1e-12)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.5])
    assert torch.equal(round_to_bfloat16(special, torch.full((5,), 65535)).float(), special)
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_to_bfloat16(nan, torch.tensor([65535, 1])).isnan().all()


# One arithmetic


@needs_c
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_c_is_the_definition_bit_for_bit(exact_sqrt, monkeypatch, narrow, num_threads):  # noqa: F811
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    wide, low = torch.float32, torch.bfloat16
    rows = [make_row(numel, narrow) for numel in SIZES]
    kinds = [(wide, low, True, True), (low, low, True, False), (low, wide, False, False), (wide, wide, False, True)]
    rows += [make_row(1000, narrow, p=p, g=g, with_fast=f, with_copy=c) for p, g, f, c in kinds]
    rows.append(make_row(700, (False, False, False))._replace(element_ranges=None))
    for factor in (1.0, torch.tensor(0.37)):
        scalars = scalars_at(70_000, grad_factor=factor)
        expected = copy.deepcopy(rows)
        for row in expected:
            ademamix_update(*row[:5], scalars, copy=row.copy, element_ranges=row.element_ranges)
        native.update(rows, scalars)
        assert_equal(rows, expected)


@needs_c
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_c_hands_on_what_is_not_finite(value):
    row = make_row(100, (True, True, True))
    row.g[17] = value
    native.update([row], scalars_at(3))
    for x in (row.m1, row.m2, row.nu):
        assert x.isfinite().sum() == 99 and not x[17].isfinite()


@needs_c
def test_c_writes_nothing_beyond_its_rows():
    pool = torch.full((5, 300), 7.0)
    narrow = torch.full((3, 300), 1.0, dtype=torch.bfloat16)
    before = narrow.clone()
    row = ParamTensors(pool[0, 100:177], pool[1, 100:177], *(x[100:177] for x in narrow), None, make_ranges(77))
    native.update([row], scalars_at(3))
    changed = (narrow != before).any(0).nonzero().flatten()
    assert changed.min() >= 100 and changed.max() <= 176 and len(changed) > 60
    assert (pool[1:] == 7).all() and (pool[0, :100] == 7).all() and (pool[0, 177:] == 7).all()


def test_averages_in_float32_are_those_without_the_option():
    """``bf16`` changes what is kept, not the step that is taken from the same state."""
    rows = [make_row(500, narrow) for narrow in ((True, False, True), (False, False, False))]
    wide = rows[1]._replace(m1=rows[0].m1.float(), m2=rows[0].m2.clone(), nu=rows[0].nu.float(), p=rows[0].p.clone())
    wide = wide._replace(g=rows[0].g)
    for row in (rows[0], wide):
        ademamix_update(*row[:5], scalars_at(7), element_ranges=row.element_ranges)
    assert torch.equal(rows[0].p, wide.p) and torch.equal(rows[0].m2, wide.m2)
    assert not torch.equal(rows[0].m1.float(), wide.m1)
    torch.testing.assert_close(rows[0].m1.float(), wide.m1, rtol=2**-7, atol=0)


@pytest.mark.parametrize("options", [{"foreach": False}, {"capturable": True}, {"implementation": "auto"}])
@pytest.mark.parametrize("state_dtype", ["bf16", ALL])
def test_the_optimizer_takes_the_same_steps_on_every_path(options, state_dtype):
    shapes = [(3, 5), (7,), (), (130, 257)]
    params, rows = random_problem(shapes, num_steps=12, dtype=torch.float32)
    rows[5][1] = rows[6][1] = None
    others = [p.clone() for p in params]
    others[3] = others[3].t().contiguous().t()  # by columns: the elements are the same, so are their numbers
    one = AdEMAMix(params, state_dtype=state_dtype, **WARM, **options)
    two = AdEMAMix(others, state_dtype=state_dtype, implementation="eager", **WARM)
    run(one, params, rows)
    run(two, others, rows)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name in EMA_STATES:
            x, y = one.state[p][name], two.state[q][name]
            assert x.dtype == y.dtype
            # The device's numbers are rounded to float32 before they are used, the host's by each operation.
            assert torch.equal(x, y) or ("capturable" in options and relative(x, y) < 1e-3)


def relative(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


# The option


@pytest.mark.parametrize(
    ("state_dtype", "beta1", "narrow"),
    [
        ("fp32", 0.9, set()),
        ("bf16", 0.9, {"exp_avg_fast", "exp_avg_sq"}),
        ("bf16", 0.0, {"exp_avg_sq"}),
        (ALL, 0.9, set(EMA_STATES)),
        ({"exp_avg_slow": "bf16"}, 0.9, {"exp_avg_slow"}),
        ({}, 0.9, set()),
        (OmegaConf.create({"exp_avg_sq": "bf16", "exp_avg_fast": "fp32"}), 0.0, {"exp_avg_sq"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_are_what_is_asked_for(state_dtype, beta1, narrow, dtype):
    p = torch.ones(1000, dtype=dtype)
    optimizer = AdEMAMix([p], betas=(beta1, 0.999, 0.9999), state_dtype=state_dtype)
    run(optimizer, [p], [[torch.ones(1000, dtype=dtype)]])
    state = {name: x for name, x in optimizer.state[p].items() if name != "step"}
    assert state.keys() == (set(EMA_STATES) if beta1 else set(EMA_STATES[1:]))
    assert {name for name, x in state.items() if x.dtype == torch.bfloat16} == narrow
    assert sum(x.nbytes for x in state.values()) == 1000 * (4 * len(state) - 2 * len(narrow))
    text = pickle.dumps(optimizer)
    assert b"omegaconf" not in text
    assert pickle.loads(text).param_groups[0]["state_dtype"] == optimizer.param_groups[0]["state_dtype"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"state_dtype": "int8"}, "(?s)8 bits .*valid: fp32, bf16"),
        ({"state_dtype": None}, "valid: fp32, bf16"),
        ({"state_dtype": torch.bfloat16}, "valid: fp32, bf16"),
        ({"state_dtype": {"exp_avg": "bf16"}}, "(?s)is no EMA state.*valid: exp_avg_fast"),
        ({"state_dtype": {"exp_avg_slow": "fp8"}}, "state_dtype.exp_avg_slow"),
        ({"state_dtype": ALL, "betas": (0.0, 0.99, 0.999)}, "no fast EMA"),
        ({"state_dtype": "bf16", "foreach": True}, "can't be done by foreach"),
        ({"state_dtype": ALL, "implementation": "foreach"}, "can't be done by foreach"),
    ],
)
def test_what_can_not_be_is_refused_at_once(options, match):
    with pytest.raises(ConfigError, match=match):
        AdEMAMix([torch.ones(2)], **options)


def test_double_parameters_keep_double_averages():
    with pytest.raises(ConfigError, match="float64"):
        AdEMAMix([torch.ones(2), torch.ones(2).double()], state_dtype="bf16")
    assert AdEMAMix([torch.ones(2).double()], state_dtype="fp32").param_groups


def test_groups_choose_for_themselves():
    p, q = torch.ones(4), torch.ones(4)
    optimizer = AdEMAMix([{"params": [p], "state_dtype": "bf16"}, {"params": [q]}])
    run(optimizer, [p, q], [[torch.ones(4)] * 2])
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    assert optimizer.state[q]["exp_avg_sq"].dtype == torch.float32


def test_comes_from_configuration():
    node = OmegaConf.create({"_target_": "anemoi_dist.optimizers.ademamix.AdEMAMix", "state_dtype": dict(ALL)})
    optimizer = create_optimizer(node, [torch.ones(2)], lr=0.1)
    assert optimizer.param_groups[0]["state_dtype"] == ALL and type(optimizer.defaults["state_dtype"]) is dict
    with pytest.raises(ConfigError, match=r"training\.optimizer\.state_dtype"):
        create_optimizer({**node, "state_dtype": "bf8"}, [torch.ones(2)], lr=0.1)


# Loading


def trained(state_dtype, *, num_steps=6):
    params, rows = random_problem([(40, 30), (7,)], num_steps=num_steps, dtype=torch.float32)
    optimizer = AdEMAMix(params, state_dtype=state_dtype, **WARM)
    run(optimizer, params, rows[:num_steps])
    return params, optimizer


@pytest.mark.parametrize("state_dtype", ["bf16", ALL])
def test_a_resumed_optimizer_goes_on_bit_for_bit(state_dtype):
    params, optimizer = trained(state_dtype)
    copies = [p.clone() for p in params]
    resumed = AdEMAMix(copies, state_dtype=state_dtype, **WARM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _, rows = random_problem([(40, 30), (7,)], num_steps=5, dtype=torch.float32, seed=1)
    run(optimizer, params, rows)
    run(resumed, copies, rows)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][name], resumed.state[q][name]) for name in EMA_STATES)


def test_another_type_of_states_is_converted_and_said():
    params, optimizer = trained("fp32")
    narrow = AdEMAMix([p.clone() for p in params], state_dtype="bf16")
    with pytest.warns(
        UserWarning, match="saved in float32 and continues in bfloat16, rounded to nearest once"
    ) as caught:
        narrow.load_state_dict(optimizer.state_dict())
    assert len(caught) == 2, "the fast EMA and that of the squared gradient"
    assert narrow.param_groups[0]["state_dtype"] == "bf16" and narrow.param_groups[0]["alpha"] == WARM["alpha"]
    q, p = narrow.param_groups[0]["params"][0], params[0]
    assert torch.equal(narrow.state[q]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"].bfloat16())
    assert torch.equal(narrow.state[q]["exp_avg_slow"], optimizer.state[p]["exp_avg_slow"])
    wide = AdEMAMix([p.clone() for p in params])
    with pytest.warns(UserWarning, match=r"exp_avg_sq was saved in bfloat16 and continues in float32 \(state_dtype\)"):
        wide.load_state_dict(narrow.state_dict())
    assert torch.equal(
        wide.state[wide.param_groups[0]["params"][0]]["exp_avg_fast"], narrow.state[q]["exp_avg_fast"].float()
    )


# What is lost


def errors_after_20000_steps(state_dtype, beta1, *, implementation="auto"):
    """Return errors relative to double precision: of each EMA state over all elements, and what all elements share."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(4096)
    wide = p.double()
    options = {"lr": 1e-4, "alpha": 5.0, "betas": (beta1, 0.999, 0.9999)}
    one = AdEMAMix([p], state_dtype=state_dtype, implementation=implementation, **options)
    two = AdEMAMix([wide], **options)
    offset = torch.linspace(-0.3, 0.3, 4096)
    for _ in range(20_000):
        p.grad = torch.randn(4096, generator=generator) + offset
        wide.grad = p.grad.double()
        one.step()
        two.step()
    pairs = {name: (x, two.state[wide][name]) for name, x in one.state[p].items() if name != "step"} | {"p": (p, wide)}
    errors = {name: relative(x, y) for name, (x, y) in pairs.items()}
    return errors, {name: abs(float((x.double() - y) @ y / (y @ y))) for name, (x, y) in pairs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state_dtype", "beta1", "bounds"),
    [
        ("fp32", 0.9, {"exp_avg_fast": 2e-7, "exp_avg_slow": 4e-6, "exp_avg_sq": 2e-6, "p": 5e-6}),
        ("bf16", 0.9, {"exp_avg_fast": 0.007, "exp_avg_slow": 4e-6, "exp_avg_sq": 0.055, "p": 0.01}),
        ("bf16", 0.0, {"exp_avg_slow": 4e-6, "exp_avg_sq": 0.055, "p": 0.01}),
        (ALL, 0.9, {"exp_avg_fast": 0.007, "exp_avg_slow": 0.11, "exp_avg_sq": 0.055, "p": 0.06}),
    ],
)
def test_errors_over_20000_steps(state_dtype, beta1, bounds):
    """The bounds leave a fifth and more to what the documentation says."""
    errors, shared = errors_after_20000_steps(state_dtype, beta1)
    assert errors.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert errors[name] < bound, (name, errors)
        # Noise, no drift: what is left is that of the parameters by a root whose mean is not the root of the mean.
        assert shared[name] < max(1e-6, bound / 10), (name, shared)


@pytest.mark.slow
def test_rounded_to_nearest_the_long_averages_stand_still(monkeypatch):
    """Why there is no other rounding: the same as above, to nearest."""
    monkeypatch.setattr(rounding, "round_to_bfloat16", lambda x, bits: x.bfloat16())
    errors, shared = errors_after_20000_steps(ALL, 0.9, implementation="eager")
    assert errors["exp_avg_sq"] > 0.9 and errors["exp_avg_slow"] > 0.3
    assert shared["exp_avg_sq"] > 0.9 and shared["exp_avg_slow"] > 0.3
