"""The Triton kernel: in its interpreter on a CPU, compiled for sm_90 without a GPU, and on a GPU where there is one."""

import copy
from pathlib import Path

import pytest
import torch

from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import AdEMAMix, gpu
from anemoi_dist.optimizers.update import ParamTensors, ademamix_update

from .problems import random_problem, run
from .test_implementations import WARM, make_rows, scalars_at, updated_by_definition
from .test_states import NARROW, exact_row

needs_triton = pytest.mark.skipif(not gpu.has_triton(), reason="needs the package triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available() or not gpu.has_triton(), reason="needs CUDA and triton")
SHAPES = [(3, 5), (7,), (1500,), (2, 1, 4)]

#: Differences of a few roundings: the interpreter has no fused multiply-add.
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


def python(warm, code, **environment):
    """Run code in a process of its own: triton decides when it is imported whether it interprets."""
    setup = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom optimizers import test_triton as t"
    )
    done = warm.run(f"{setup}\n{code}", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_kernel(device="cpu"):
    """Hold the kernel against the definition, for every combination of types."""
    wide, narrow = torch.float32, torch.bfloat16
    for beta1 in (0.9, 0.3, 0.0):
        for p, g in ((wide, wide), (wide, narrow), (narrow, narrow)):
            for factor in (1.0, torch.tensor(0.37)):
                rows = make_rows((1, 1024, 2500), p=p, g=g, with_fast=beta1 > 0, with_copy=p is wide)
                scalars = scalars_at(7, beta1=beta1, grad_factor=factor)
                expected = updated_by_definition(rows, scalars)
                moved = [ParamTensors(*(None if x is None else x.to(device) for x in row)) for row in rows]
                gpu.update(moved, scalars._replace(grad_factor=factor if factor == 1.0 else factor.to(device)))
                for row, other in zip(moved, expected, strict=True):
                    for name, x, y in zip(ParamTensors._fields, row, other, strict=True):
                        if x is not None:
                            close = CLOSE if x.dtype is wide else {"rtol": 2**-7, "atol": 1e-6}
                            torch.testing.assert_close(x.cpu(), y, **close, msg=name)


def check_optimizer(capturable):
    """Hold the optimizer with the kernel against the eager one, with a parameter that falls behind."""
    params, rows = random_problem(SHAPES, num_steps=20, dtype=torch.float32)
    rows[5][1] = None
    others = [p.clone() for p in params]
    one = AdEMAMix(params, implementation="triton", capturable=capturable, **WARM)
    assert one.implementation_in_use() == {"triton": len(SHAPES)}
    one.grad_scale = torch.tensor(2.0)
    run(one, params, [[None if g is None else g * 2 for g in row] for row in rows])
    two = AdEMAMix(others, implementation="eager", **WARM)
    run(two, others, rows)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        assert one.state[p]["step"] == two.state[q]["step"]


def check_offsets():
    """Nothing beyond the end is written."""
    pool = torch.full((5, 3000), 7.0)
    pool[4] = 1.0
    before = pool.clone()
    gpu.update([ParamTensors(*(x[100:1177] for x in pool))], scalars_at(3))
    changed = (pool != before).any(0).nonzero().flatten()
    assert changed.min() == 100 and changed.max() == 1176


def check_rounding(device="cpu"):
    """Hold the EMA states in bfloat16 against the definition, bit for bit where no other rounding comes before."""
    for narrow in NARROW:
        for numel in (1, 1024, 5000):
            row = exact_row(numel, narrow)
            expected = copy.deepcopy(row)
            scalars = scalars_at(70_000, beta1=0.75, betas=(0.75, 0.75, 0.75), beta3_warmup=None)
            ademamix_update(*expected[:5], scalars, element_ranges=expected.element_ranges)
            moved = ParamTensors(*(None if x is None else x.to(device) for x in row))
            gpu.update([moved], scalars)
            for name in ("m1", "m2", "nu"):
                assert torch.equal(getattr(moved, name).cpu(), getattr(expected, name)), (name, narrow, numel)
            torch.testing.assert_close(moved.p.cpu(), expected.p, **CLOSE)


def check_rounding_with_steps_on_the_device():
    """The step reaches the hash unharmed whether host or device counts it."""
    pairs = []
    for options in ({"implementation": "triton"}, {"capturable": True, "implementation": "triton"}, {"foreach": False}):
        p = torch.zeros(1500)
        optimizer = AdEMAMix([p], state_dtype="bf16", betas=(0.5, 0.5, 0.5), **options)
        run(optimizer, [p], [[torch.full((1500,), 1.0 + 2**-10)]])
        optimizer.state[p]["step"].fill_(2.0**32 + 65_535)
        run(optimizer, [p], [[torch.full((1500,), 1.0 + 2**-9)]])
        pairs.append(optimizer.state[p])
    assert len(pairs[0]["exp_avg_fast"].unique()) == 2
    for state in pairs[1:]:
        assert all(torch.equal(state[name], pairs[0][name]) for name in state)


def compile_for(capability, is_rounded=False, num_ranges=None):
    """Print the size of the machine code and what of PTX the promises rest on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anemoi_dist.optimizers._triton import ademamix_kernel

    names = ("p_ptr", "g_ptr", "fast_ptr", "slow_ptr", "square_ptr", "copy_ptr", "numbers_ptr", "ranges_ptr")
    kept = "*bf16" if is_rounded else "*fp32"
    types = ("*fp32", "*bf16", kept, kept, kept, "*bf16", "*fp32", "*i64")
    signature = dict(zip(names, types, strict=True)) | {"numel": "i64", "num_ranges": "i32"}
    constants = {"has_fast": True, "has_copy": True, "is_rounded": is_rounded, "block": gpu.BLOCK}
    if num_ranges is not None:  # Triton makes a kernel of its own for an argument of 1
        constants["num_ranges"] = num_ranges
    source = ASTSource(ademamix_kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = {"enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    print(len(built.asm["cubin"]), "sqrt.rn.f32" in ptx, "div.rn.f32" in ptx, "sqrt.approx" in ptx, "fma.rn" in ptx)


@needs_triton
def test_interpreted(warm):
    checks = "t.check_kernel(); t.check_offsets(); t.check_optimizer(False); t.check_optimizer(True)"
    python(warm, checks + "; t.check_rounding(); t.check_rounding_with_steps_on_the_device()", TRITON_INTERPRET="1")


@needs_triton
def test_compiles_for_sm_90_without_a_gpu(warm):
    kinds = ("", ", is_rounded=True", ", is_rounded=True, num_ranges=1")
    lines = python(warm, "\n".join(f"t.compile_for(90{kind})" for kind in kinds), TRITON_INTERPRET="0").splitlines()
    assert len(lines) == len(kinds)
    for line in lines:
        size, *found = line.split()
        assert int(size) > 1000
        assert found == ["True", "True", "False", "True"]


@needs_triton
def test_a_tensor_on_the_cpu_is_refused():
    p = torch.ones(2)
    with pytest.raises(ConfigError, match="works on CUDA"):
        run(AdEMAMix([p], implementation="triton"), [p], [[torch.ones(2)]])


def test_without_triton_the_choice_is_refused(monkeypatch):
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="not installed"):
        AdEMAMix([torch.ones(2)], implementation="triton")


@needs_cuda
def test_kernel_on_a_gpu():
    check_kernel("cuda")
    check_rounding("cuda")


@needs_cuda
def test_auto_on_a_gpu():
    params = [torch.ones(1 << 20, device="cuda"), torch.ones(5, device="cuda")]
    assert AdEMAMix(params).implementation_in_use() == {"triton": 1, "foreach": 1}
    assert AdEMAMix(params, capturable=True).implementation_in_use() == {"triton": 2}


@needs_cuda
def test_a_replayed_graph_is_the_eager_sequence_bit_for_bit():
    params, rows = random_problem([(70_001,)], num_steps=9, dtype=torch.float32)
    ours, theirs = params[0].cuda(), params[0].cuda()
    captured = AdEMAMix([ours], capturable=True, implementation="triton", **WARM)
    launched = AdEMAMix([theirs], capturable=True, implementation="triton", **WARM)
    ours.grad, theirs.grad = torch.zeros_like(ours), torch.zeros_like(theirs)
    stream = torch.cuda.Stream()
    graph = None
    for index, (g,) in enumerate(rows):
        ours.grad.copy_(g)
        theirs.grad.copy_(g)
        launched.step()
        if index < 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                captured.step()
            torch.cuda.current_stream().wait_stream(stream)
            continue
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured.step()
        graph.replay()
        assert torch.equal(ours, theirs)
    assert captured.state[ours]["step"] == len(rows)
