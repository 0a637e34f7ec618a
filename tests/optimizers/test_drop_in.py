"""``AdEMAMix`` in an optimizer's place: torch alone, DCP, ZeroRedundancyOptimizer, Lightning, Hydra."""

import copy

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anemoi_dist.optimizers import AdEMAMix, schedule_values
from anemoi_dist.optimizers.ademamix import EMA_STATES

from .test_implementations import WARM


def make_model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_dcp_does_not_advance_the_schedules(lr, eps):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdEMAMix(model.parameters(), **{**WARM, "lr": lr, "eps": eps})
    seen = get_optimizer_state_dict(model, optimizer)
    assert seen["state"]["0.weight"].keys() == {"step", *EMA_STATES}
    assert seen["state"]["0.weight"]["step"] == 0
    assert schedule_values(optimizer)["alpha"] == 0.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_a_first_step_at_rate_zero_counts():
    p = torch.ones(3)
    optimizer = AdEMAMix([p], lr=0.0)
    p.grad = torch.tensor([0.0, 1.0, 0.0])
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["exp_avg_sq"][1] > 0


def _through_dcp(world, dtype):
    """Train 4 steps, hand the state through DCP to a fresh model, train 4 more; return both models' parameters."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    def build():
        model = fully_shard(make_model(dtype))
        return model, AdEMAMix(model.parameters(), **WARM)

    model, optimizer = build()
    train(model, optimizer, range(4))
    assert optimizer.implementation_in_use() == ({"c": 4} if optimizer_has_kernel() else {"eager": 4})
    resumed, other = build()
    fresh = get_optimizer_state_dict(resumed, other)
    assert {float(state["step"]) for state in fresh["state"].values()} == {0.0}
    set_model_state_dict(resumed, get_model_state_dict(model))
    # A copy: like every optimizer of torch, this one keeps the tensors that it loads.
    set_optimizer_state_dict(resumed, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for state in other.state.values():
        assert {state[name].dtype for name in EMA_STATES} == {torch.float32}
        assert state["step"] == 4
    for m, o in ((model, optimizer), (resumed, other)):
        train(m, o, range(4, 8))
    return [[p.full_tensor().detach() for p in m.parameters()] for m in (model, resumed)]


def optimizer_has_kernel():
    from anemoi_dist.optimizers import native

    return native.library() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_and_dcp_resume_bit_for_bit(ranks, dtype):
    for model, resumed in ranks(2).run(_through_dcp, dtype):
        assert all(torch.equal(p, q) for p, q in zip(model, resumed, strict=True))


def _through_zero_redundancy(world):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdEMAMix, **WARM)
    train(model, optimizer, range(6))  # the same batch on every rank: the gradients need no reduction
    optimizer.consolidate_state_dict(to=0)
    held = sum(state["exp_avg_slow"].numel() for state in optimizer.optim.state.values() if "exp_avg_slow" in state)
    state = optimizer.state_dict()["state"] if world.rank == 0 else {}
    return [p.detach() for p in model.parameters()], held, {k: v["exp_avg_slow"].dtype for k, v in state.items()}


def test_zero_redundancy_optimizer(ranks):
    model = make_model()
    train(model, AdEMAMix(model.parameters(), **WARM), range(6))
    results = ranks(2).run(_through_zero_redundancy)
    for params, _, _ in results:
        assert all(torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True))
    assert sum(held for _, held, _ in results) == sum(p.numel() for p in model.parameters())
    assert set(results[0][2].values()) == {torch.float32}


def test_lightning_resumes_from_its_checkpoint(tmp_path):
    from support.quiet_lightning import lightning, quiet_trainer

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def training_step(self, batch, _):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return AdEMAMix(self.parameters(), **WARM)

    # One batch: resumed, Lightning begins the next epoch with a batch too many.
    data = DataLoader(TensorDataset(torch.randn(24, 5, generator=torch.Generator().manual_seed(0))), batch_size=24)

    def fit(max_steps, **resume):
        module = Module()
        trainer = quiet_trainer(max_steps=max_steps, default_root_dir=tmp_path)
        trainer.fit(module, data, **resume)
        return module, trainer

    whole, _ = fit(12)
    _, trainer = fit(6)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = fit(12, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert schedule_values(trainer.optimizers[0])["alpha"] == pytest.approx(8.0 * 12 / 30)


def test_anemois_hydra_node():
    """As anemoi-training builds it: ``instantiate`` with a generator of parameters, and betas in a ListConfig."""
    node = OmegaConf.create({"_target_": "anemoi_dist.optimizers.AdEMAMix", "betas": [0.9, 0.95, 0.9999], "alpha": 8.0})
    model = make_model()
    optimizer = instantiate(node, params=(p for p in model.parameters()), lr=0.01)
    assert type(optimizer) is AdEMAMix
    assert optimizer.defaults["betas"] == (0.9, 0.95, 0.9999) and type(optimizer.defaults["betas"]) is tuple
    before = next(model.parameters()).detach().clone()
    train(model, optimizer, range(2))
    assert not torch.equal(next(model.parameters()), before)


def _given(index, numel, step):
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * step + index))


def _sharded_states(world, state_dtype):
    """Step sharded parameters with given gradients; return whole parameters and states."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = fully_shard(make_model())
    params = list(model.parameters())
    optimizer = AdEMAMix(params, state_dtype=state_dtype, **WARM)
    for step in range(5):
        for index, p in enumerate(params):
            p.grad = distribute_tensor(_given(index, p.numel(), step).view(p.shape), p.device_mesh, p.placements)
        optimizer.step()
    return [[x.detach().full_tensor() for x in (p, *(optimizer.state[p][name] for name in EMA_STATES))] for p in params]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_rounds_states_as_one_process_does(ranks, num_ranks):
    state_dtype = dict.fromkeys(EMA_STATES, "bf16")
    params = list(make_model().parameters())
    optimizer = AdEMAMix(params, state_dtype=state_dtype, **WARM)
    for step in range(5):
        for index, p in enumerate(params):
            p.grad = _given(index, p.numel(), step).view(p.shape)
        optimizer.step()
    for result in ranks(num_ranks).run(_sharded_states, state_dtype):
        for p, tensors in zip(params, result, strict=True):
            for x, y in zip(tensors, (p, *(optimizer.state[p][name] for name in EMA_STATES)), strict=True):
                assert x.dtype == y.dtype and torch.equal(x, y)


def _refused_step(world, cut, gradient_cut, refused):
    """Return what a step with these options is refused with; without them it is taken."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from anemoi_dist.errors import ConfigError

    mesh = init_device_mesh("cpu", (2,))
    placements = [Replicate() if dim is None else Shard(dim) for dim in (cut, gradient_cut)]
    p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, placements[:1]))
    p.grad = distribute_tensor(torch.ones(4, 6), mesh, placements[1:])
    AdEMAMix([p]).step()
    try:
        AdEMAMix([p], **refused).step()
    except ConfigError as error:
        return str(error)
    return ""


def test_what_is_cut_by_columns_is_refused_with_states_in_bfloat16(ranks):
    for message in ranks(2).run(_refused_step, 1, 1, {"state_dtype": "bf16"}):
        assert "cut along their first dimension" in message and "state_dtype=fp32" in message


def test_a_gradient_that_is_spread_otherwise_is_none_for_the_kernel(ranks):
    for message in ranks(2).run(_refused_step, 0, None, {"implementation": "c"}):
        assert "implementation='c'" in message and "spread over ranks alike" in message
