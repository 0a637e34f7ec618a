import sys

import pytest
import torch

from anemoi_dist.config.targets import resolve_target
from anemoi_dist.config.timm_scheduler import load_timm_scheduler
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers.ademamix import AdEMAMix


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is not allowed unless a test says so; importing any of it leaves a trace in sys.modules."""
    root = tmp_path / "strange_package"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "nets.py").write_text(
        "import os\nfrom functools import partial\nimport torch\n"
        "class Net(torch.nn.Module):\n    class Inner:\n        pass\n"
        "def build():\n    return Net()\nhalf = partial(build)\nnumber = 3\nShell = os.system\n"
    )
    (root / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "strange_package"
    for name in [name for name in sys.modules if name.split(".")[0] == "strange_package"]:
        del sys.modules[name]


def test_names_resolve():
    assert resolve_target("torch.optim.AdamW", key="k") is torch.optim.AdamW
    assert resolve_target("torch.optim.adamw.AdamW", key="k") is torch.optim.AdamW
    assert resolve_target("torch.optim.lr_scheduler.StepLR", key="k") is torch.optim.lr_scheduler.StepLR
    assert resolve_target("anemoi_dist.optimizers.AdEMAMix", key="k") is AdEMAMix


def test_anemois_name_is_ours():
    assert resolve_target("anemoi.training.optimizers.AdEMAMix.AdEMAMix", key="k") is AdEMAMix
    with pytest.raises(ConfigError):
        resolve_target("anemoi.training.optimizers.AdEMAMix.math", key="k")


def test_timm_comes_without_its_models():
    cosine = load_timm_scheduler().CosineLRScheduler
    assert resolve_target("timm.scheduler.CosineLRScheduler", key="k") is cosine
    assert resolve_target("timm.scheduler.cosine_lr.CosineLRScheduler", key="k") is cosine
    assert "timm.models" not in sys.modules


@pytest.mark.parametrize("name", ["strange_package.nets.Net", "strange_package", "torch.optimizers.AdamW", "os.system"])
def test_what_is_not_allowed_is_refused_before_it_is_imported(package, name):
    with pytest.raises(ConfigError) as caught:
        resolve_target(name, key="model._target_", allowed=["strange_packages", "strange_package.net"])
    assert "strange_package" not in sys.modules
    assert caught.value.key == "model._target_"
    assert {"torch.optim", "timm.scheduler", "anemoi_dist", "anemoi.models"} <= set(caught.value.valid)
    assert "security.allowed_targets" in caught.value.fix


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.lr_scheduler.types.FunctionType",
        "torch.optim.lr_scheduler.partial",
        "torch.optim.lr_scheduler.warnings.sys.modules",
        "torch.optim.swa_utils.Module",
        "timm.scheduler.cosine_lr.math.sqrt",
        "timm.scheduler.cosine_lr.torch.load",
        "anemoi_dist.config.targets.importlib.import_module",
        "anemoi_dist.config.targets.Callable",
    ],
)
def test_other_names_of_what_is_not_allowed_are_refused(name):
    with pytest.raises(ConfigError, match="not on the allow-list"):
        resolve_target(name, key="k")


def test_users_allow_list(package):
    def resolve(name, *allowed):
        return resolve_target(name, key="k", allowed=allowed)

    net = resolve("strange_package.nets.Net", "strange_package")
    assert net.__name__ == "Net"
    assert resolve("strange_package.nets.Net", "strange_package.nets.Net") is net
    assert resolve("strange_package.nets.Net.Inner", "strange_package.nets.Net") is net.Inner
    assert resolve("strange_package.nets.build", "strange_package.nets").__name__ == "build"
    for name in ("nets.half", "nets.Shell", "nets.os.system", "nets.torch.load"):
        with pytest.raises(ConfigError, match="not on the allow-list"):
            resolve(f"strange_package.{name}", "strange_package")
    with pytest.raises(ConfigError, match="not on the allow-list"):
        resolve("strange_package.nets.build", "strange_package.nets.Net")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strange_package.nets.Nett", "has no 'Nett'"),
        ("strange_package.nets.number", "not a int"),
        ("strange_package.nets", "not a module"),
        ("strange_package.absent.Net", "has no 'absent'"),
        ("strange_package.broken.Net", "a_module_that_is_not_there"),
    ],
)
def test_what_cannot_be_resolved_says_why(package, name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_target(name, key="k", allowed=["strange_package"])
    with pytest.raises(ConfigError, match=message):
        resolve_target(name, key="k", allowed=[name.rpartition(".")[0], name])


def test_an_allowed_package_that_is_not_installed():
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve_target("absent_package.Net", key="k", allowed=["absent_package"])


@pytest.mark.parametrize(
    "name", [None, 3, "", "torch.optim.", "torch.optim.AdamW()", "torch.optim.AdamW.__init__", "a b"]
)
def test_what_is_no_import_path_is_refused(name):
    with pytest.raises(ConfigError, match="import path"):
        resolve_target(name, key="k")


@pytest.mark.parametrize("prefix", ["", "*", "my_package.*", 5])
def test_allow_list_has_no_wildcards(prefix):
    with pytest.raises(ConfigError, match=r"security\.allowed_targets"):
        resolve_target("torch.optim.AdamW", key="k", allowed=[prefix])


@pytest.mark.parametrize(
    "name",
    [
        "anemoi_dist.tasks.forecast.module.build_model",
        "anemoi_dist.optimizers.factory.create_optimizer",
        "anemoi_dist.run.directory.write_atomically",
        "anemoi_dist.checkpoint.store.LocalStore",
    ],
)
def test_of_what_is_built_in_only_classes_of_the_right_kind_are_called(name):
    from torch import nn

    with pytest.raises(ConfigError, match=r"must be a kind of torch\.nn"):
        resolve_target(name, key="model._target_", base=nn.Module)
    if name[-5:].islower():
        with pytest.raises(ConfigError, match="must be a class"):
            resolve_target(name, key="model._target_")


def test_a_model_cannot_carry_a_target_in_its_arguments(tmp_path):
    from support import toy

    from anemoi_dist.tasks.forecast.module import build_model

    node = {"_target_": "torch.optim.AdamW", "data": {"inner": [{"_target_": "os.system", "command": "true"}]}}
    with pytest.raises(ConfigError, match=r"must be a kind of torch\.nn"):
        build_model(node, toy.make_spec())
    node["_target_"] = "support.toy.OddModel"
    with pytest.raises(ConfigError, match=r"model\.data\.inner\[0\]\._target_='os\.system'"):
        build_model(node, toy.make_spec(), allowed=["support.toy"])
    evil = {
        "_target_": "anemoi_dist.tasks.forecast.module.build_model",
        "node": {"_target_": "os.system"},
        "allowed": ["os", "posix"],
    }
    with pytest.raises(ConfigError, match="build_model"):
        build_model({**evil, "spec": None}, toy.make_spec())
