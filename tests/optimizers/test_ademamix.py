import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers.ademamix import (
    EMA_STATES,
    AdEMAMix,
    ademamix_update,
    device_scalars,
    host_scalars,
    schedule_values,
)

from .problems import apple_in_double, random_problem, run

WARM = {"alpha": 8.0, "beta3_warmup": 40, "alpha_warmup": 30, "weight_decay": 0.1, "lr": 0.01}
SHAPES = [(3, 5), (7,), (), (2, 1, 4)]
PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "capturable": {"capturable": True}}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_gold_vector(options):
    rows = [[0.1, -0.2, 0.3], [0.05, 0.4, -0.1], [-0.3, 0.2, 0.0], [0.2, -0.1, 0.1], [0.1, 0.1, 0.1]]
    rows = [[torch.tensor(row, dtype=torch.float64)] for row in rows]
    p = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    optimizer = AdEMAMix([p], lr=0.01, alpha=8, beta3_warmup=4, alpha_warmup=4, weight_decay=0.1, **options)
    run(optimizer, [p], rows[:1])
    expected = torch.tensor([0.988992025703398, -1.987992025202999, 0.489492025036199], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-13)
    run(optimizer, [p], rows[1:])
    expected = torch.tensor([0.976542256818823, -1.995466165553971, 0.471176269316568], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-13)
    slow = torch.tensor([3.986423739724293e-05, 2.682585935806295e-05, 1.195933201598677e-04], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_slow"], slow, rtol=1e-13, atol=0)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_equations(options, beta1):
    betas = (beta1, 0.99, 0.9995)
    params, rows = random_problem([(20,)], num_steps=120)
    start = params[0].clone()
    optimizer = AdEMAMix(params, betas=betas, **WARM, **options)
    run(optimizer, params, rows)
    expected, slow = apple_in_double(start, [row[0] for row in rows], betas=betas, eps=1e-8, **WARM)
    assert relative(params[0], expected) < 1e-13
    assert relative(optimizer.state[params[0]]["exp_avg_slow"], slow) < 1e-12


def test_defaults_are_apples():
    defaults = AdEMAMix([torch.zeros(1)]).defaults
    assert {
        k: defaults[k] for k in ("lr", "betas", "alpha", "beta3_warmup", "alpha_warmup", "eps", "weight_decay")
    } == {
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 2.0,
        "beta3_warmup": None,
        "alpha_warmup": None,
        "eps": 1e-8,
        "weight_decay": 0.0,
    }


def test_pytorch_optimizer_in_the_papers_form():
    peer = pytest.importorskip("pytorch_optimizer")
    params, rows = random_problem([(30,), (4, 3)], num_steps=300)
    others = [p.clone() for p in params]
    run(
        AdEMAMix(params, lr=0.01, alpha=8, beta3_warmup=200, alpha_warmup=200, weight_decay=0.1, beta3_form="paper"),
        params,
        rows,
    )
    theirs = peer.AdEMAMix(
        others,
        lr=0.01,
        betas=(0.9, 0.999, 0.9999),
        alpha=8.0,
        t_alpha_beta3=200,
        weight_decay=0.1,
        weight_decouple=True,
    )
    run(theirs, others, rows)
    assert max(relative(a, b) for a, b in zip(params, others, strict=True)) < 1e-12


def test_optax_without_schedules():
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    params, rows = random_problem([(30,)], num_steps=50)
    with jax.enable_x64(True):
        theirs = optax.contrib.ademamix(
            0.01, b1=0.9, b2=0.999, b3=0.9999, alpha=8.0, eps=1e-8, eps_root=0.0, weight_decay=0.1
        )
        x = jax.numpy.asarray(params[0].numpy())
        state = theirs.init(x)
        step = jax.jit(theirs.update)
        for row in rows:
            updates, state = step(jax.numpy.asarray(row[0].numpy()), state, x)
            x = optax.apply_updates(x, updates)
        expected = torch.tensor(jax.device_get(x), dtype=torch.float64)
    run(AdEMAMix(params, lr=0.01, alpha=8, weight_decay=0.1), params, rows)
    assert relative(params[0], expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_foreach_is_the_same_bit_for_bit(dtype, beta1, maximize):
    params, rows = random_problem(SHAPES, num_steps=40, dtype=dtype)
    rows[5][1] = rows[6][1] = None  # one parameter falls behind
    others = [p.clone() for p in params]
    options = {"betas": (beta1, 0.99, 0.9999), "maximize": maximize, **WARM}
    one, many = AdEMAMix(params, foreach=False, **options), AdEMAMix(others, foreach=True, **options)
    run(one, params, rows)
    run(many, others, rows)
    assert one.state[params[1]]["step"] == 38
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert one.state[p].keys() == many.state[q].keys()
        assert all(torch.equal(one.state[p][k], many.state[q][k]) for k in one.state[p])


@pytest.mark.parametrize("form", ["apple", "paper"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_capturable_equals_the_host_path(form, dtype, tolerance):
    params, rows = random_problem(SHAPES, num_steps=60, dtype=dtype)
    rows[5][1] = None
    others = [p.clone() for p in params]
    options = {"schedule_start": 3, "beta3_form": form, **WARM}
    run(AdEMAMix(params, **options), params, rows)
    captured = AdEMAMix(others, capturable=True, **{**options, "lr": torch.tensor(WARM["lr"], dtype=torch.float64)})
    run(captured, others, rows)
    assert max(relative(a, b) for a, b in zip(others, params, strict=True)) < tolerance


@pytest.mark.parametrize("form", ["apple", "paper"])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_device_scalars_equal_host_scalars(form, beta1):
    options = {"betas": (beta1, 0.999, 0.9999), "schedule_start": 5, "beta3_form": form, **WARM}
    group = AdEMAMix([torch.zeros(1)], **options).param_groups[0]
    steps = torch.arange(1.0, 60.0)
    for step, scalars in zip(steps, device_scalars(group, steps, dtype=torch.float64), strict=True):
        for name, value in host_scalars(group, float(step))._asdict().items():
            assert float(getattr(scalars, name)) == pytest.approx(value, rel=1e-9, abs=1e-15), name


def test_complements_of_the_betas_are_computed_in_double():
    group = AdEMAMix([torch.zeros(1)], betas=(0.9, 0.999, 0.999999)).param_groups[0]
    assert host_scalars(group, 1).weight_slow == 1 - 0.999999
    in_single = float(1 - torch.tensor(0.999999))
    assert abs(in_single / (1 - 0.999999) - 1) > 1e-2
    [scalars] = device_scalars(group, torch.tensor([1.0]), dtype=torch.float32)
    assert float(scalars.weight_slow) == pytest.approx(1e-6, rel=1e-7)


def test_slow_average_in_single_precision_follows_double():
    params, rows = random_problem([(50,)], num_steps=3000, dtype=torch.float32)
    optimizer = AdEMAMix(params)
    run(optimizer, params, rows)
    _, slow = apple_in_double(
        params[0],
        [r[0] for r in rows],
        lr=0,
        betas=(0.9, 0.999, 0.9999),
        alpha=2,
        beta3_warmup=None,
        alpha_warmup=None,
        eps=1e-8,
        weight_decay=0,
    )
    assert relative(optimizer.state[params[0]]["exp_avg_slow"], slow) < 3e-6


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_keep_wide_averages(dtype, options):
    params, rows = random_problem(SHAPES, num_steps=5, dtype=dtype)
    optimizer = AdEMAMix(params, **WARM, **options)
    run(optimizer, params, rows)
    for p in params:
        assert p.dtype == dtype
        assert {optimizer.state[p][name].dtype for name in EMA_STATES} == {torch.float32}

    loaded = AdEMAMix([p.clone() for p in params], **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, loaded.param_groups[0]["params"], strict=True):
        for name in EMA_STATES:
            assert loaded.state[q][name].dtype == torch.float32
            assert torch.equal(loaded.state[q][name], optimizer.state[p][name])


def test_narrow_parameter_is_computed_wide_and_rounded_once():
    p = torch.tensor([1.0, -2.0, 3.0]).bfloat16()
    wide, g = p.float(), torch.tensor([0.3, 0.1, -0.2]).bfloat16()
    group = AdEMAMix([p], **WARM).param_groups[0]
    averages = [[torch.zeros(3) for _ in range(3)] for _ in range(2)]
    ademamix_update(p, g, *averages[0], host_scalars(group, 1))
    ademamix_update(wide, g.float(), *averages[1], host_scalars(group, 1))
    assert torch.equal(p, wide.bfloat16())


def test_float64_parameters_have_float64_averages():
    p = torch.ones(2, dtype=torch.float64)
    optimizer = AdEMAMix([p])
    run(optimizer, [p], [[torch.ones(2, dtype=torch.float64)]])
    assert {optimizer.state[p][name].dtype for name in EMA_STATES} == {torch.float64}


def test_no_fast_average_without_beta1():
    p = torch.ones(3)
    optimizer = AdEMAMix([p], betas=(0.0, 0.999, 0.9999))
    run(optimizer, [p], [[torch.ones(3)]])
    assert set(optimizer.state[p]) == {"step", "exp_avg_slow", "exp_avg_sq"}
    loaded = AdEMAMix([torch.ones(3)], betas=(0.0, 0.999, 0.9999))
    saved = optimizer.state_dict()
    # Apple's and anemoi-core's step reads the key, and creates it for an empty state only.
    assert saved["state"][0].keys() == {"step", *EMA_STATES} and saved["state"][0]["exp_avg_fast"] is None
    loaded.load_state_dict(saved)
    assert "exp_avg_fast" not in next(iter(loaded.state.values()))


@pytest.mark.parametrize("foreach", [False, True])
def test_maximize(foreach):
    params, rows = random_problem(SHAPES, num_steps=10)
    others = [p.clone() for p in params]
    run(AdEMAMix(params, maximize=True, foreach=foreach, **WARM), params, rows)
    run(AdEMAMix(others, foreach=foreach, **WARM), others, [[-g for g in row] for row in rows])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_tensor_learning_rate(options):
    params, rows = random_problem(SHAPES, num_steps=10)
    others = [p.clone() for p in params]
    rate = torch.tensor(0.02, dtype=torch.float64)
    run(AdEMAMix(params, lr=rate, **options), params, rows)
    run(AdEMAMix(others, lr=0.02, **options), others, rows)
    assert rate == 0.02
    assert max(relative(p, q) for p, q in zip(params, others, strict=True)) < 1e-15


def test_groups_override_and_generators_and_names():
    params, rows = random_problem([(4,), (4,)], num_steps=8)
    alone = [p.clone() for p in params]
    given = {"params": iter(params[:1]), "lr": 0.1, "betas": [0.0, 0.9, 0.99]}
    optimizer = AdEMAMix([given], lr=0.01)
    optimizer.add_param_group({"params": params[1], "alpha": 5.0})
    run(optimizer, params, rows)
    run(AdEMAMix((p for p in alone[:1]), lr=0.1, betas=(0.0, 0.9, 0.99)), alone[:1], [row[:1] for row in rows])
    run(AdEMAMix(alone[1:], lr=0.01, alpha=5.0), alone[1:], [row[1:] for row in rows])
    assert torch.equal(params[0], alone[0])
    assert torch.equal(params[1], alone[1])
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.9, 0.99)
    assert given["betas"] == [0.0, 0.9, 0.99]  # the caller's group is left alone
    assert AdEMAMix([("bias", params[1])]).param_groups[0]["param_names"] == ["bias"]


def test_list_config_becomes_a_tuple_and_pickles():
    p = torch.ones(2)
    optimizer = AdEMAMix([p], betas=OmegaConf.create([0.9, 0.99, 0.999]))
    assert optimizer.param_groups[0]["betas"] == optimizer.defaults["betas"] == (0.9, 0.99, 0.999)
    assert type(optimizer.param_groups[0]["betas"]) is tuple
    run(optimizer, [p], [[torch.ones(2)]])
    again = pickle.loads(pickle.dumps(optimizer))
    [state] = again.state.values()
    assert torch.equal(state["exp_avg_slow"], optimizer.state[p]["exp_avg_slow"])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["param_groups"][0]["betas"] == (0.9, 0.99, 0.999)


def test_hooks_and_closure_and_profiler_wrapper():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdEMAMix([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[p]["exp_avg_slow"].dtype if p in o.state else None)
    )

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9.0
    assert seen == ["before", "after"]
    assert p < 3.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[-1] == torch.float32


def test_step_is_on_the_cpu_and_counts_updates_with_a_gradient():
    p, idle = torch.ones(2), torch.ones(2)
    optimizer = AdEMAMix([p, idle])
    run(optimizer, [p, idle], [[torch.ones(2), None]] * 3)
    step = optimizer.state[p]["step"]
    assert (step.dtype, step.shape, step.device.type, float(step)) == (torch.float64, (), "cpu", 3.0)
    assert idle not in optimizer.state
    assert torch.equal(idle, torch.ones(2))


def test_init_state_creates_what_is_missing():
    p = torch.ones(3, dtype=torch.bfloat16)
    optimizer = AdEMAMix([p])
    optimizer.init_state(p)
    assert {k: (v.dtype, v.shape) for k, v in optimizer.state[p].items()} == {
        "step": (torch.float64, ()),
        **dict.fromkeys(EMA_STATES, (torch.float32, (3,))),
    }
    optimizer.state[p]["exp_avg_sq"].fill_(2.0)
    optimizer.init_state(p)
    assert optimizer.state[p]["exp_avg_sq"].eq(2.0).all()
    with pytest.raises(ValueError, match="no parameter group"):
        optimizer.init_state(torch.ones(3))


def test_switch_from_adamw_in_mid_training():
    params, rows = random_problem([(6,)], num_steps=40)
    adamw = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    run(adamw, params, rows[:20])
    twin = params[0].clone()
    optimizer = AdEMAMix(params, **WARM, schedule_start=20)
    saved = adamw.state_dict()["state"]
    renamed = {
        k: {"step": s["step"], "exp_avg_fast": s["exp_avg"], "exp_avg_sq": s["exp_avg_sq"]} for k, s in saved.items()
    }
    optimizer.load_state_dict({"state": copy.deepcopy(renamed), "param_groups": optimizer.state_dict()["param_groups"]})
    assert schedule_values(optimizer) == {"alpha": 0.0, "beta3": 0.9}
    run(optimizer, params, rows[20:21])
    assert optimizer.state[params[0]]["step"] == 21
    assert schedule_values(optimizer)["alpha"] == pytest.approx(8.0 / 30)

    # The same step by the equations: bias corrections of step 21, schedules of step 1, no slow EMA before.
    g, b3 = rows[20][0], schedule_values(optimizer)["beta3"]
    m1 = 0.9 * renamed[0]["exp_avg_fast"] + 0.1 * g
    nu = 0.999 * renamed[0]["exp_avg_sq"] + 0.001 * g * g
    update = (m1 / (1 - 0.9**21) + 8 / 30 * (1 - b3) * g) / (nu.sqrt() / math.sqrt(1 - 0.999**21) + 1e-8)
    assert relative(params[0], twin - 0.01 * (update + 0.1 * twin)) < 1e-13


def test_adamw_groups_are_refused_with_the_fix():
    p = torch.ones(2)
    adamw = torch.optim.AdamW([p])
    with pytest.raises(ConfigError, match="three numbers"):
        AdEMAMix([p]).load_state_dict(adamw.state_dict())


def test_old_state_dictionaries_fill_new_keys():
    """anemoi-training's: ``step`` an int, none of our options."""
    p = torch.ones(2)
    theirs = {
        "state": {
            0: {"step": 7, "exp_avg_fast": torch.ones(2), "exp_avg_slow": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        },
        "param_groups": [
            {"lr": 0.5, "betas": [0.9, 0.95, 0.9999], "eps": 1e-8, "alpha": 8.0, "beta3_warmup": 10, "alpha_warmup": 10}
            | {"weight_decay": 0.01, "params": [0]}
        ],
    }
    optimizer = AdEMAMix([p], schedule_start=3, alpha=1.0)
    optimizer.load_state_dict(theirs)
    [group] = optimizer.param_groups
    assert (group["schedule_start"], group["beta3_form"], group["foreach"], group["capturable"]) == (
        0,
        "apple",
        None,
        False,
    )
    assert group["alpha"] == 8.0  # torch's convention: the checkpoint's groups win
    assert group["betas"] == (0.9, 0.95, 0.9999)
    assert isinstance(optimizer.state[p]["step"], torch.Tensor)
    run(optimizer, [p], [[torch.ones(2)]])
    assert optimizer.state[p]["step"] == 8


@settings(max_examples=25, deadline=None)
@given(
    num_steps=st.integers(0, 6),
    more_steps=st.integers(1, 4),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    warmup=st.one_of(st.none(), st.integers(0, 8)),
    path=st.sampled_from(list(PATHS)),
    seed=st.integers(0, 2**16),
)
def test_state_dict_round_trip(num_steps, more_steps, beta1, dtype, warmup, path, seed):
    params, rows = random_problem([(3,), (2, 2)], num_steps=num_steps + more_steps, dtype=dtype, seed=seed)
    options = {"betas": (beta1, 0.99, 0.999), "beta3_warmup": warmup, "alpha_warmup": warmup, "weight_decay": 0.1}
    optimizer = AdEMAMix(params, **options, **PATHS[path])
    run(optimizer, params, rows[:num_steps])
    others = [p.clone() for p in params]
    resumed = AdEMAMix(others, lr=1.0, **PATHS[path])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, rows[num_steps:])
    run(resumed, others, rows[num_steps:])
    assert resumed.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][name], resumed.state[q][name]) for name in optimizer.state[p])


def test_schedule_values_of_wrappers_and_of_others():
    p = torch.ones(2)
    optimizer = AdEMAMix([p], betas=(0.9, 0.999, 0.9999), **WARM)
    assert schedule_values(optimizer) == {"alpha": 0.0, "beta3": 0.9}
    run(optimizer, [p], [[torch.ones(2)]] * 15)

    class Wrapper:
        pass

    wrapper = Wrapper()
    wrapper.optimizer = optimizer
    assert schedule_values(wrapper)["alpha"] == 4.0
    optimizer.param_groups[0]["params"] = []  # as ZeRO 3 leaves it between steps
    assert schedule_values(wrapper)["alpha"] == 4.0
    assert schedule_values(torch.optim.AdamW([p])) == {}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lr": "1e-3"}, "lr"),
        ({"lr": torch.ones(2)}, "lr"),
        ({"lr": torch.tensor(-1.0)}, "lr"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"alpha": -2}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta3_warmup": -1}, "beta3_warmup"),
        ({"alpha_warmup": -1}, "alpha_warmup"),
        ({"alpha_warmup": 2.5}, "alpha_warmup"),
        ({"schedule_start": -1}, "schedule_start"),
        ({"schedule_start": None}, "schedule_start"),
        ({"betas": (0.9, 0.999)}, "betas"),
        ({"betas": (0.9, 0.999, 0.9999, 0.9)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"betas": (0.9, math.nan, 0.9999)}, "betas"),
        ({"betas": (0.9, 0.999, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.999, 0.9999)}, "betas"),
        ({"betas": (0.9, 0.999, 1 - 1e-9), "beta3_warmup": 10}, "betas"),
        ({"beta3_form": "appel"}, "beta3_form"),
        ({"foreach": True, "capturable": True}, "foreach"),
    ],
)
def test_refusals_say_value_rule_and_fix(options, key):
    with pytest.raises(ConfigError) as caught:
        AdEMAMix([torch.zeros(1)], **options)
    assert caught.value.key == key
    assert caught.value.fix or caught.value.valid
    assert isinstance(caught.value, ValueError)
    optimizer = AdEMAMix([torch.zeros(1)])
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [torch.zeros(1)], **options})
    assert len(optimizer.param_groups) == 1


def test_complex_and_sparse_are_refused_before_anything_changes():
    with pytest.raises(ConfigError, match="view_as_real"):
        AdEMAMix([torch.zeros(1, dtype=torch.complex64)])
    p, table = torch.ones(3), torch.ones(3, 2)
    p.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2), check_invariants=True)
    optimizer = AdEMAMix([{"params": [p]}, {"params": [table]}])
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def _train_sharded(world, num_steps):
    """Return the first parameter and its slow EMA, whole, after some FSDP2 steps."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    if world is not None:
        fully_shard(model)
    optimizer = AdEMAMix(model.parameters(), **WARM)
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    p = next(model.parameters())
    slow = optimizer.state[p]["exp_avg_slow"]
    if world is None:
        return p.detach(), slow
    assert isinstance(slow, DTensor)
    assert slow.to_local().shape == p.to_local().shape
    return p.full_tensor().detach(), slow.full_tensor()


def test_sharded_by_fsdp2_equals_one_process(ranks):
    expected = _train_sharded(None, 12)
    for result in ranks(2).run(_train_sharded, 12):
        for whole, single in zip(result, expected, strict=True):
            assert relative(whole, single) < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graph_follows_the_schedules():
    params, rows = random_problem(SHAPES, num_steps=13, dtype=torch.float32)
    others = [p.clone() for p in params]
    run(AdEMAMix(others, **WARM), others, rows)
    on_device = [p.cuda() for p in params]
    optimizer = AdEMAMix(on_device, capturable=True, **WARM)
    static = [torch.zeros_like(p) for p in on_device]
    for p, g in zip(on_device, static, strict=True):
        p.grad = g
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for row in rows[:3]:
            torch._foreach_copy_(static, [g.cuda() for g in row])
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for row in rows[3:]:
        torch._foreach_copy_(static, [g.cuda() for g in row])
        graph.replay()
    assert max(relative(p.cpu(), q) for p, q in zip(on_device, others, strict=True)) < 1e-5
    assert optimizer.state[on_device[0]]["step"] == 13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_foreach_on_a_device_differs_in_the_last_place_at_most():
    params, rows = random_problem(SHAPES, num_steps=40, dtype=torch.float32)
    results = []
    for foreach in (False, True):
        mine = [p.cuda() for p in params]
        run(AdEMAMix(mine, foreach=foreach, **WARM), mine, [[g.cuda() for g in row] for row in rows])
        results.append(mine)
    assert max(relative(p, q) for p, q in zip(*results, strict=True)) < 1e-6
