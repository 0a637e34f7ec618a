"""Every implementation against the one definition, ``ademamix_update``, and which of them runs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import AdEMAMix, implementations, native
from anemoi_dist.optimizers.update import ParamTensors, UpdateScalars, ademamix_update, foreach_update, host_scalars

from .problems import random_problem, run

ROOT = Path(__file__).parents[2]
WARM = {"alpha": 8.0, "beta3_warmup": 40, "alpha_warmup": 30, "weight_decay": 0.1, "lr": 0.01}
#: Below, at and above a vector, a block and a thread's chunk.
SIZES = (1, 15, 16, 63, 64, 65, 1000, 16384, 16385, 40_000)

needs_c = pytest.mark.skipif(native.library() is None, reason="the package was built without a compiler")


def make_rows(sizes, *, p=torch.float32, g=torch.float32, with_fast=True, with_copy=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(n):
        return torch.randn(n, generator=generator)

    return [
        ParamTensors(
            randn(n).to(p),
            randn(n).to(g),
            randn(n) if with_fast else None,
            randn(n),
            randn(n).square(),
            torch.empty(n, dtype=torch.bfloat16) if with_copy else None,
        )
        for n in sizes
    ]


def scalars_at(step, *, beta1=0.9, grad_factor=1.0, **options):
    options = {**WARM, "betas": (beta1, 0.99, 0.9999), **options}
    group = AdEMAMix([torch.zeros(1)], **options).param_groups[0]
    return host_scalars(group, step)._replace(grad_factor=grad_factor)


def updated_by_definition(rows, scalars):
    rows = copy.deepcopy(rows)
    for row in rows:
        ademamix_update(*row[:5], scalars, copy=row.copy)
    return rows


@pytest.fixture
def exact_sqrt(monkeypatch):
    """Give torch the correctly rounded square root; the one that it calls on x86 may be off by one unit."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(np.atleast_1d(x.numpy()))).view_as(x))


def assert_equal(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        for name, x, y in zip(ParamTensors._fields, row, other, strict=True):
            assert x is y is None or torch.equal(x, y), (name, row.p.numel())


@needs_c
@pytest.mark.parametrize("p", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_copy", [False, True])
@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_c_is_the_definition_bit_for_bit(exact_sqrt, monkeypatch, p, g, with_copy, beta1, num_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    rows = make_rows(SIZES, p=p, g=g, with_copy=with_copy, with_fast=beta1 > 0)
    for factor in (1.0, torch.tensor(0.37)):
        scalars = scalars_at(7, beta1=beta1, grad_factor=factor)
        expected = updated_by_definition(rows, scalars)
        native.update(rows, scalars)
        assert_equal(rows, expected)


@needs_c
def test_torchs_square_root_is_all_that_differs():
    rows = make_rows((100_000,))
    expected = updated_by_definition(rows, scalars_at(7))
    before = rows[0].p.clone()
    native.update(rows, scalars_at(7))
    assert_equal([rows[0]._replace(p=None)], [expected[0]._replace(p=None)])
    difference = (rows[0].p - expected[0].p).abs()
    # A unit in the root and a rounding in each of the three lines after it; one rounding of the parameter.
    bound = 2**-21 * (expected[0].p - before).abs() + 2**-23 * expected[0].p.abs()
    assert (difference <= bound).all()


@needs_c
def test_c_takes_rows_of_all_types_in_one_call(exact_sqrt):
    rows = [
        row
        for index, (p, g) in enumerate([(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)] * 2)
        for row in make_rows((700,), p=p, g=g, with_copy=index > 1, with_fast=index != 2, seed=index)
    ]
    expected = updated_by_definition(rows, scalars_at(3))
    native.update(rows, scalars_at(3))
    assert_equal(rows, expected)


@needs_c
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_c_hands_on_what_is_not_finite(exact_sqrt, value):
    rows = make_rows((100,), with_copy=True)
    rows[0].g[17] = value
    expected = updated_by_definition(rows, scalars_at(3))
    native.update(rows, scalars_at(3))
    for name, x, y in zip(ParamTensors._fields, rows[0], expected[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


@needs_c
def test_c_writes_nothing_beyond_its_rows():
    pool = torch.full((5, 300), 7.0)
    pool[4] = 1.0
    before = pool.clone()
    native.update([ParamTensors(*(x[100:177] for x in pool))], scalars_at(3))
    changed = (pool != before).any(0).nonzero().flatten()
    assert changed.min() == 100 and changed.max() == 176


@needs_c
def test_c_flushes_denormals_and_leaves_the_callers_mode_alone():
    p, fast = torch.zeros(64), torch.full((64,), 1e-3)
    row = ParamTensors(p, torch.zeros(64), fast, torch.zeros(64), torch.ones(64))
    for step in range(1, 1500):
        native.update([row], scalars_at(step))
    assert fast.count_nonzero() == 0
    slow_to_end = torch.full((64,), 1e-3)
    for _ in range(1500):
        slow_to_end.lerp_(torch.zeros(64), 0.1)
    assert slow_to_end.count_nonzero() == 64, "in torch it stays denormal"
    assert (torch.full((64,), 1e-38) * 1e-3).count_nonzero() == 64


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_optimizer_in_c_equals_eager(exact_sqrt, dtype, beta1, maximize):
    shapes = [(3, 5), (7,), (), (2, 1, 4), (130, 257)]
    params, rows = random_problem(shapes, num_steps=30, dtype=dtype)
    rows[5][1] = rows[6][1] = None  # one parameter falls behind
    others = [p.clone() for p in params]
    options = {"betas": (beta1, 0.99, 0.9999), "maximize": maximize, **WARM}
    one = AdEMAMix(params, implementation="c", **options)
    two = AdEMAMix(others, implementation="eager", **options)
    run(one, params, rows)
    run(two, others, rows)
    assert one.state[params[1]]["step"] == 28
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(one.state[p][k], two.state[q][k]) for k in one.state[p])


@pytest.mark.parametrize("factor", [1.0, 0.37, torch.tensor(0.37)])
def test_foreach_is_the_definition_bit_for_bit(factor):
    rows = make_rows((1, 33, 500), with_copy=True)
    scalars = scalars_at(5, grad_factor=factor)
    expected = updated_by_definition(rows, scalars)
    foreach_update(rows, scalars)
    assert_equal(rows, expected)


# Which one runs


def names_of(params, **options):
    return AdEMAMix(params, **options).implementation_in_use()


@needs_c
def test_auto_chooses_by_tensor(monkeypatch):
    params = [torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.ones(3).double(), torch.ones(3, 2).t()]
    assert names_of(params) == {"c": 2, "eager": 2}
    assert names_of(params, capturable=True) == {"eager": 4}
    assert names_of(params, foreach=True) == {"foreach": 4}
    assert names_of(params, foreach=False) == names_of(params, implementation="eager") == {"eager": 4}
    monkeypatch.setattr(native, "library", lambda: None)
    assert names_of([*params, torch.empty(implementations.LARGE)]) == {"eager": 5}


@needs_c
def test_auto_looks_at_the_gradients_layout_too():
    p = torch.ones(4, 3)
    other = p.clone()
    p.grad = torch.arange(12.0).view(3, 4).t()
    other.grad = p.grad.contiguous()
    for x in (p, other):
        AdEMAMix([x]).step()
    assert torch.equal(p, other)
    with pytest.raises(ConfigError, match="contiguous"):
        AdEMAMix([p], implementation="c").step()


@needs_c
@pytest.mark.parametrize("implementation", ["auto", "c"])
@pytest.mark.parametrize("what", ["exp_avg_slow", "copy"])
def test_what_is_not_of_the_parameters_size_is_refused_and_not_written_past(implementation, what):
    p = torch.ones(1000)
    optimizer = AdEMAMix([p], implementation=implementation)
    optimizer.init_state(p)
    if what == "copy":
        optimizer.copies = {p: torch.zeros(10, dtype=torch.bfloat16)}
    else:
        optimizer.state[p][what] = torch.zeros(4)
    with pytest.raises((ConfigError, RuntimeError), match=r"of the parameter's shape|size of tensor"):
        run(optimizer, [p], [[torch.ones(1000)]])


def test_a_gradient_that_is_negated_when_it_is_read():
    p, q, lazy = torch.ones(1), torch.ones(1), torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert lazy.is_neg() and lazy.is_contiguous()
    p.grad, q.grad = lazy, torch.full((1,), -1.0)
    for x in (p, q):
        AdEMAMix([x]).step()
    assert torch.equal(p, q)


def test_without_a_kernel_the_optimizer_works_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    p, q = torch.ones(5), torch.ones(5)
    run(AdEMAMix([p]), [p], [[torch.ones(5)]] * 3)
    run(AdEMAMix([q], foreach=False), [q], [[torch.ones(5)]] * 3)
    assert torch.equal(p, q)
    with pytest.raises(ConfigError, match="without a compiler"):
        AdEMAMix([p], implementation="c")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"implementation": "C"}, "valid: "),
        ({"implementation": None}, "valid: "),
        ({"implementation": "c", "foreach": True}, "contradicts foreach=True"),
        ({"implementation": "foreach", "foreach": False}, "contradicts foreach=False"),
        ({"implementation": "c", "capturable": True}, "capturable=True keeps them on the device"),
        ({"implementation": "foreach", "capturable": True}, "capturable=True keeps them on the device"),
        ({"implementation": "compile"}, "valid: auto, c, triton, foreach, eager"),
    ],
)
def test_impossible_choices_are_refused_at_once(options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        AdEMAMix([torch.ones(2)], **options)
    assert caught.value.key == "implementation"


@pytest.mark.parametrize("name", ["maximize", "capturable", "foreach"])
@pytest.mark.parametrize("value", ["no", 0, 3])
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r}: must be true or false"):
        AdEMAMix([torch.ones(2)], **{name: value})


@needs_c
def test_impossible_choices_for_a_tensor_are_refused_before_anything_changes():
    p, wide = torch.ones(2), torch.ones(2, dtype=torch.float64)
    optimizer = AdEMAMix([p, wide], implementation="c")
    with pytest.raises(ConfigError, match="float64"):
        run(optimizer, [p, wide], [[torch.ones(2), torch.ones(2).double()]])
    assert torch.equal(p, torch.ones(2))
    assert optimizer.state[p]["step"] == 0


def test_the_choice_is_not_loaded():
    p = torch.ones(2)
    saved = AdEMAMix([p], implementation="eager")
    run(saved, [p], [[torch.ones(2)]])
    state = saved.state_dict()
    state["param_groups"][0]["implementation"] = "triton"
    fresh = AdEMAMix([torch.ones(2)], implementation="foreach")
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["implementation"] == "foreach"
    assert fresh.state_dict()["state"][0]["step"] == 1


# What a step takes beside the gradients


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_grad_scale_divides_and_copies_are_written(options):
    params, rows = random_problem([(5,), (70, 3)], num_steps=5, dtype=torch.float32)
    others = [p.clone() for p in params]
    optimizer = AdEMAMix(params, **WARM, **options)
    optimizer.grad_scale = torch.tensor(4.0)  # a power of two: the scaled gradients are exact
    narrow = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    optimizer.copies = dict(zip(params, narrow, strict=True))
    run(optimizer, params, rows)
    run(AdEMAMix(others, **WARM, **options), others, [[g / 4 for g in row] for row in rows])
    for p, q, n in zip(params, others, narrow, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(n, p.bfloat16())


def test_amp_scaler_leaves_the_scaling_to_the_step():
    p, q = torch.nn.Parameter(torch.ones(6)), torch.nn.Parameter(torch.ones(6))
    optimizer, plain = AdEMAMix([p], lr=0.1), AdEMAMix([q], lr=0.1)
    assert optimizer._step_supports_amp_scaling and not AdEMAMix([p], capturable=True)._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    x = torch.arange(1.0, 7.0)
    for step in range(4):
        optimizer.zero_grad()
        bad = torch.full((6,), float("inf")) if step == 2 else x
        scaler.scale((p * bad).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            plain.zero_grad()
            (q * x).sum().backward()
            plain.step()
    assert optimizer.state[p]["step"] == 3
    assert torch.equal(p, q)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_step_counts_past_two_to_the_24():
    p = torch.ones(2)
    optimizer = AdEMAMix([p])
    run(optimizer, [p], [[torch.ones(2)]])
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(2.0**24)  # float32, as others save it
    optimizer.load_state_dict(saved)
    run(optimizer, [p], [[torch.ones(2)]] * 3)
    assert optimizer.state[p]["step"] == 2**24 + 3


@pytest.mark.slow
def test_no_drift_from_double_over_20000_steps():
    """The error that all elements share, relative to the value; rounding of single elements averages out."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(4096, generator=generator)
    wide = p.double()
    options = {"lr": 1e-4, "alpha": 5.0, "weight_decay": 0.1, "betas": (0.9, 0.999, 0.9999), "foreach": None}
    one, two = AdEMAMix([p], **options), AdEMAMix([wide], **options)
    offset = torch.linspace(-0.3, 0.3, 4096)
    for _ in range(20_000):
        p.grad = torch.randn(4096, generator=generator) + offset
        wide.grad = p.grad.double()
        one.step()
        two.step()
    states = [(p, wide)] + [
        (one.state[p][k], two.state[wide][k]) for k in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    ]
    for x, y in states:
        assert abs(float((x - y) @ y / (y @ y))) < 1e-6
        assert float((x - y).norm() / y.norm()) < 1e-5


# The build


def build(tmp_path, **environment):
    folder = tmp_path / "anemoi_dist" / "optimizers"
    folder.mkdir(parents=True)
    (folder / "_ademamix.c").write_bytes((ROOT / "anemoi_dist/optimizers/_ademamix.c").read_bytes())
    (tmp_path / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return done, list((tmp_path / "out").rglob("_ademamix*"))


def assert_loads_without_torch(path):
    code = f"import ctypes, sys; print(ctypes.CDLL({str(path)!r}).ademamix_version(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(native.VERSION), "False"]


@needs_c
def test_the_installed_kernel_loads_without_torch():
    assert_loads_without_torch(native.library()._name)


@pytest.mark.slow  # ten seconds of compiler
def test_builds_and_loads_without_torch(tmp_path):
    done, [built] = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert_loads_without_torch(built)


def test_a_machine_without_a_compiler_gets_a_warning_and_no_kernel(tmp_path):
    done, built = build(tmp_path, CC="/nonexistent/cc", LDSHARED="/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    assert built == []
    assert "_ademamix" in done.stderr + done.stdout


def test_scalars_keep_the_order_that_the_kernels_rely_on():
    assert UpdateScalars._fields == (
        "lr", "weight_decay", "eps", "weight_fast", "weight_slow", "weight_sq", "alpha", "inverse_fast", "inverse_sq",
        "step_low", "step_high", "grad_factor",
    )  # fmt: skip
