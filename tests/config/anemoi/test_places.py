"""Targets of an anemoi configuration: by name before anything is imported, and by base class before it is built."""

import ast
import importlib
import itertools
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from support.anemoi_configs import packaged_configs

from anemoi_dist.config.anemoi import places
from anemoi_dist.config.anemoi.places import PLACES, Kind, check_target_bases, check_target_names, find_kind
from anemoi_dist.config.targets import nested_targets
from anemoi_dist.config.tree import is_below, place
from anemoi_dist.errors import ConfigError

ANEMOI = packaged_configs().parents[1]
#: Packages whose names a place may have; torch's would take long to read.
ROOTS = (*(ANEMOI / name for name in ("graphs", "models", "training")),)


def names_of(file, module):
    """Yield every name that a module binds at its top, imports among them."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield f"{module}.{node.name}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{module}.{(alias.asname or alias.name).partition('.')[0]}" for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (f"{module}.{target.id}" for target in node.targets if isinstance(target, ast.Name))


def importable_names():
    for root in ROOTS:
        for file in sorted(root.rglob("*.py")):
            module = ".".join(("anemoi", *file.relative_to(ANEMOI).with_suffix("").parts)).removesuffix(".__init__")
            yield module
            yield from names_of(file, module)
    init = Path(find_spec("torch").submodule_search_locations[0])
    for path in ("nn/__init__.py", "nn/modules/__init__.py", "nn/utils/__init__.py", "nn/modules/module.py"):
        module = f"torch.{path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
        yield from names_of(init / path, module)
    yield from ("torch.load", "torch.hub.load", "torch.nn.attention._fa4.register_flash_attention_fa4", "os.system")
    yield from ("anemoi_dist.telemetry.events.EventLog", "builtins.eval", "hydra.utils.get_class", "subprocess.Popen")


NAMES = sorted(set(importable_names()))


def settings_with(pattern, name):
    """Return settings with a target where a pattern of :data:`PLACES` has one."""
    settings = {}
    place(settings, pattern.replace(".**.", ".any.").replace("**", "any").replace("*", "x"), {"_target_": name})
    return settings


def is_refused(pattern, name, check=check_target_names):
    try:
        check(settings_with(pattern, name))
    except ConfigError as error:
        assert error.value == name
        return True
    return False


def test_every_pattern_finds_its_own_kind():
    for pattern, kind in PLACES.items():
        ((key, _),) = nested_targets(settings_with(pattern, "x"))
        assert find_kind(key) is kind, key


def test_names_outside_of_the_modules_of_their_place_are_refused(monkeypatch):
    """Of all that can be imported below the packages of Anemoi, without an import."""
    monkeypatch.setattr(importlib, "import_module", lambda *_: pytest.fail("imported"))
    assert len(NAMES) > 2000
    cases = list(itertools.product((p for p, kind in PLACES.items() if kind.base), NAMES))
    for pattern, name in random.Random(0).sample(cases, 20000):
        module, _, last = name.rpartition(".")
        inside = any(is_below(module, (allowed.removesuffix(".*"),)) for allowed in PLACES[pattern].modules)
        if not inside or not last[0].isupper():
            assert is_refused(pattern, name), (pattern, name)


@pytest.mark.filterwarnings("ignore")
def test_names_that_pass_are_kinds_of_their_base_or_refused():
    """Every class that a place's modules bind."""
    from anemoi_dist.tasks.anemoi.environment import import_anemoi_training

    import_anemoi_training()
    for kind in dict.fromkeys(PLACES.values()):
        pattern = next(pattern for pattern in PLACES if PLACES[pattern] is kind)
        if not kind.base:
            continue
        base = places._import(kind.base)
        passed = [name for name in NAMES if kind.covers(name)]
        accepted = [name for name in passed if not is_refused(pattern, name, check_target_bases)]
        assert accepted, kind
        for name in passed:
            found = getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2], None)
            fits = isinstance(found, type) and issubclass(found, base)
            fits = fits and is_below(found.__module__, [module.removesuffix(".*") for module in kind.modules])
            assert fits == (name in accepted), (kind, name)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("graph.nodes.hidden.node_builder", "anemoi.graphs.describe.GraphDescriptor"),
        ("graph.nodes.hidden.node_builder", "anemoi.graphs.nodes.builders.base.torch.load"),
        ("graph.nodes.hidden.node_builder", "anemoi.graphs.nodes.TriNodes.__init__"),
        ("graph.nodes.hidden.node_builder", ["anemoi.graphs.nodes.TriNodes"]),
        ("graph.nodes.hidden.attributes.a", "torch.nn.attention._fa4.register_flash_attention_fa4"),
        ("model.layer_kernels.Linear", "torch.nn.modules.module.register_module_forward_hook"),
        ("model.layer_kernels.Linear", "torch.nn._reduction.Any"),
        ("training.training_loss.datasets.data", "anemoi.training.losses.get_loss_function"),
        ("training.optimization.optimizer", "torch.load"),
        ("data.datasets.data.extra", "anemoi.models.preprocessing.normalizer.InputNormalizer"),
        ("dataloader.training.datasets.data", "anemoi.graphs.nodes.TriNodes"),
        ("model.anything", "anemoi_dist.telemetry.events.EventLog"),
    ],
)
def test_attacks(key, name):
    settings = {}
    place(settings, key, {"_target_": name})
    with pytest.raises(ConfigError, match=r"_target_"):
        check_target_names(settings)


def test_targets_in_lists_and_at_any_depth():
    settings = {"graph": {"edges": [{"edge_builders": [{"_target_": "anemoi.graphs.edges.KNNEdges"}]}]}}
    check_target_names(settings)
    settings["graph"]["edges"][0]["edge_builders"][0]["x"] = [{"y": {"_target_": "os.system"}}]
    with pytest.raises(ConfigError, match="nothing is built") as caught:
        check_target_names(settings)
    assert caught.value.key == "graph.edges[0].edge_builders[0].x[0].y._target_"


def test_modules_to_compile():
    """Hydra imports them, although they are no targets."""
    check_target_names({"model": {"compile": [{"module": "anemoi.training.losses.CRPS"}]}})
    with pytest.raises(ConfigError) as caught:
        check_target_names({"model": {"compile": [{}, {"module": "os.system"}]}})
    assert caught.value.key == "model.compile[1].module"


def test_what_the_user_allows():
    settings = {"model": {"processor": {"_target_": "collections.OrderedDict"}}}
    with pytest.raises(ConfigError, match="allowed_targets"):
        check_target_names(settings)
    check_target_names(settings, allowed=["collections"])
    with pytest.raises(ConfigError, match=r"kind of torch\.nn"):
        check_target_bases(settings, allowed=["collections"])


def test_the_case_of_the_issue():
    text = """
    nodes: {hidden: {node_builder: {_target_: anemoi.graphs.describe.GraphDescriptor, path: evil.pt}}}
    edges: []
    """
    with pytest.raises(ConfigError, match="BaseNodeBuilder"):
        check_target_names({"graph": yaml.safe_load(text)})


def test_a_kind_says_what_belongs_there():
    assert str(Kind("a.Base", ("a", "b.*"))) == "one of a or b.*, derived from a.Base"
