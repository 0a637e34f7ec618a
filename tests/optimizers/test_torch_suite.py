"""torch's generic optimizer cases (``torch.testing._internal.common_optimizers``) with every implementation."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._pytree import tree_flatten

from anemoi_dist.optimizers import AdEMAMix, native

cases = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest")

IMPLEMENTATIONS = [{"implementation": name} for name in ("c", "foreach", "eager")] + [{"capturable": True}]
INPUTS = [x.kwargs for x in cases.optim_inputs_func_adamw("cpu") if "amsgrad" not in x.kwargs]
INPUTS += [{"lr": torch.tensor(0.01)}, {"betas": (0.0, 0.99, 0.999)}, {"alpha_warmup": 9, "beta3_warmup": 9}]
SCHEDULERS = next(info for info in cases.optim_db if info.optim_cls is torch.optim.SGD).scheduler_inputs
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
every_input = pytest.mark.parametrize("kwargs", [{**x, **y} for x in INPUTS for y in IMPLEMENTATIONS], ids=str)
pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no compiler"),
    pytest.mark.filterwarnings("ignore:Detected call of", "ignore:Converting a tensor"),
]


class Problem:
    """The problem of torch's suite: ``sum((W x + b)^2)``."""

    def __init__(self, kwargs, *, of=None):
        torch.manual_seed(0)
        # Not contiguous, as in torch's second half of the cases.
        self.x, weight, bias = torch.randn(5), torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
        self.params = [p.detach().clone().requires_grad_() for p in (of.params if of else (weight, bias))]
        self.optimizer = AdEMAMix(self.params, **kwargs)

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.params[0].mv(self.x) + self.params[1]).square().sum()
        loss.backward()
        return loss

    def run(self, num_steps):
        for _ in range(num_steps):
            self.optimizer.step(self.closure)
        return self.params


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_file(x):
    torch.save(x, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def assert_equal(ours, theirs):
    (found, kind), (expected, expected_kind) = tree_flatten(ours), tree_flatten(theirs)
    assert kind == expected_kind
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) if torch.is_tensor(y) else x == y
        for x, y in zip(found, expected, strict=True)
    )


@every_implementation
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=len)
def test_goes_in_the_right_direction(implementation, schedulers):
    for maximize in (False, True):
        problem = Problem({"lr": torch.tensor(0.01), "maximize": maximize, **implementation})
        built = [make(problem.optimizer) for make in schedulers]
        first = problem.closure().item()
        for _ in range(20):
            for scheduler in built:
                scheduler.step(*[problem.closure()] * isinstance(scheduler, cases.ReduceLROnPlateau))
            problem.run(1)
        assert (problem.closure().item() > first) is maximize
        assert "lr" in repr(problem.optimizer)


@every_input
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, through_pickle, through_file])
def test_a_state_dict_is_idempotent_and_goes_on(kwargs, way):
    problem = Problem(kwargs)
    problem.run(3)
    other, before = Problem(kwargs, of=problem), copy.deepcopy(problem.optimizer.state_dict())
    if way in (copy.deepcopy, through_pickle):
        other.optimizer = way(problem.optimizer)
        other.params = other.optimizer.param_groups[0]["params"]
    else:
        other.optimizer.load_state_dict(way(before))
    assert other.optimizer.defaults.keys() == problem.optimizer.defaults.keys()
    for _ in range(2):
        assert_equal(other.optimizer.state_dict(), problem.optimizer.state_dict())
        other.optimizer.load_state_dict(other.optimizer.state_dict())
    other.optimizer.add_param_group({"params": torch.zeros(2)})
    assert other.optimizer.param_groups[1].keys() == problem.optimizer.param_groups[0].keys()
    assert_equal(other.run(3), problem.run(3))


@every_input
def test_older_dictionaries_steps_that_are_numbers_and_steps_without_gradients(kwargs):
    problem = Problem(kwargs)
    problem.run(2)
    old = copy.deepcopy(problem.optimizer.state_dict())
    for state in old["state"].values():
        state["step"] = state["step"].item()
    for name in ("maximize", "foreach", "capturable"):
        del old["param_groups"][0][name]
    other = Problem(kwargs, of=problem)
    other.optimizer.load_state_dict(old)
    other.optimizer.zero_grad()
    before = copy.deepcopy(other.params)
    other.optimizer.step()
    assert_equal(other.params, before)
    assert [state["step"].item() for state in other.optimizer.state.values()] == [2, 2]


@pytest.mark.parametrize(
    "case", cases.get_error_inputs_for_all_optims("cpu", torch.float32), ids=lambda c: str(c.error_regex)
)
def test_errors_are_torchs(case):
    given = case.optimizer_error_input
    with (pytest.warns if issubclass(case.error_type, Warning) else pytest.raises)(
        case.error_type, match=case.error_regex
    ):
        AdEMAMix([torch.zeros(2)] if given.params is None else given.params, **given.kwargs)


@every_implementation
def test_a_flattened_state_of_dcp_is_set_twice(implementation):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as set_state

    options, model = StateDictOptions(flatten_optimizer_state_dict=True), torch.nn.Linear(3, 2)
    optimizer = AdEMAMix(model.parameters(), **implementation)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    for _ in range(2):
        flat = get_optimizer_state_dict(model, optimizer, options=options)
        set_state(model, optimizer, flat, options=options)
    again = get_optimizer_state_dict(model, optimizer, options=options)
    assert flat.keys() == again.keys() and not any("differentiable" in key for key in again)
    assert_equal(again["state.weight.exp_avg_slow"], flat["state.weight.exp_avg_slow"])
