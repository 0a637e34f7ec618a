"""Account of the keys of an anemoi configuration."""

import pytest

from anemoi_dist.config.anemoi.audit import FIXED, LEFT_OUT, READ, TRANSLATED, audit, graph_file
from anemoi_dist.config.tree import place
from anemoi_dist.errors import ConfigError


def settings(**values):
    tree = {}
    for key, value in values.items():
        place(tree, key.replace("__", "."), value)
    return tree


@pytest.mark.parametrize("key", [*READ, *TRANSLATED, *FIXED])
def test_known_keys(key):
    tree = {}
    place(tree, key, FIXED[key].valid[0] if key in FIXED else None)
    assert audit(tree) == []


def test_what_is_left_out_is_named_once():
    tree = {}
    for key in LEFT_OUT:
        place(tree, f"{key}.a.b", 1)
        place(tree, f"{key}.a.c", 1)
    left_out = audit(tree)
    assert len(left_out) == len(set(left_out)) == len(LEFT_OUT)
    assert {"diagnostics.a", "system.output"} < set(left_out)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("training.deterministic", True, "task.overrides=[training.deterministic=false]"),
        ("training.deterministic", 0, "default is false"),
        ("training.preferred_blas_backend", "cublaslt", "training.preferred_blas_backend=null"),
        ("training.strategy._target_", "pytorch_lightning.strategies.FSDPStrategy", "engine=ddp"),
        ("training.strategy.broadcast_buffers", True, "broadcast_buffers=false"),
        ("training.run_id", "abc", "system.input.warm_start=ITS_LAST_CKPT goes on from it, run.id=NAME"),
        ("training.fork_run_id", "abc", "run.id=NEW"),
        ("dataloader.multiprocessing_context", "spawn", "default is null"),
        ("diagnostics.debug.anomaly_detection", True, "default is false"),
        ("diagnostics.log.wandb.enabled", True, "telemetry=mlflow"),
        ("training.max_step", 3, "did you mean training.max_steps?"),
        ("training.swa.enabled", True, "known here"),
        ("trainig.max_steps", 3, "training.max_steps"),
        ("system.hardware.files", "x", "known here"),
        ("mine", 3, "known here"),
    ],
)
def test_what_would_be_ignored_is_refused(key, value, part):
    tree = {}
    place(tree, key, value)
    with pytest.raises(ConfigError) as caught:
        audit(tree)
    assert caught.value.key == key
    assert part in str(caught.value)


def test_a_key_that_others_refer_to_acts():
    tree = {"mine": {"weight": 3, "deep": {"a": 1}}}
    assert audit(tree, referred=["mine.weight", "mine.deep"]) == []
    with pytest.raises(ConfigError, match="deep"):
        audit(tree, referred=["mine.weight"])


def test_callbacks():
    package = "anemoi.training.diagnostics.callbacks"
    watching = [{"_target_": f"{package}.evaluation.RolloutEval"}, {"_target_": f"{package}.plot.LossCurvePlot"}]
    assert audit(settings(diagnostics__callbacks=watching)) == ["diagnostics.callbacks"]
    for name in (f"{package}.stopping.EarlyStopping", f"{package}.optimiser.X", "mine.Callback", None):
        with pytest.raises(ConfigError, match="may change training"):
            audit(settings(diagnostics__callbacks=[*watching, {"_target_": name}]))


def test_the_file_of_the_graph(tmp_path):
    built = {"nodes": {"data": {}}, "edges": []}
    there = tmp_path / "graph.pt"
    there.touch()
    loader = ["anemoi.graphs.create.load_graph_from_file"]
    for path, graph in [
        (None, built),
        (str(tmp_path / "new.pt"), built),
        (str(there), {**built, "overwrite": True}),
    ]:
        assert graph_file(settings(system__input__graph=path, graph=graph), allowed=()) is None
    for graph in ({**built, "overwrite": False}, {"overwrite": False}):
        tree = settings(system__input__graph=str(there), graph=graph)
        with pytest.raises(ConfigError, match="pickle"):
            graph_file(tree, allowed=())
        assert graph_file(tree, allowed=loader) == str(there)
