"""A changed model: one report of everything, renames and permitted gaps, the same under every engine."""

from __future__ import annotations

import difflib
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support import changed, toy
from support.saving import ORIGIN, save

from anemoi_dist.checkpoint.matching import FROM_ADAMW, match, renamed
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.shard import TensorInfo
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.engines import ENGINES
from anemoi_dist.config.parse import from_yaml, to_yaml
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import CheckpointError, ConfigError


class Source:
    """Tensors in memory, as a checkpoint."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._held = {(name.replace("__", "."), "param"): tensor for name, tensor in tensors.items()}

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        return {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in self._held.items()}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        out.copy_(self._held[fqn, kind].reshape(-1)[start : start + out.numel()])


def wanted(**shapes: tuple[int, ...]) -> dict[tuple[str, str], TensorInfo]:
    return {(name.replace("__", "."), "param"): TensorInfo(shape, torch.float32) for name, shape in shapes.items()}


def matched(source: Source, want: dict, rename: dict | None = None, allow: list | None = None):
    return match(source, want, rename=rename or {}, allow_missing=allow or [])


@pytest.mark.parametrize(
    ("rename", "name", "expected"),
    [
        ({"a": "b"}, "a.w", "b.w"),
        ({"a": "b"}, "ab.w", "ab.w"),
        ({"a.w": "c"}, "a.w", "c"),
        ({"a": "b", "a.c": "d"}, "a.c.w", "d.w"),
        ({"": "model"}, "a.w", "model.a.w"),
        ({"module": ""}, "module.a.w", "a.w"),
        ({"a.b": "c.d.e"}, "a.b.w", "c.d.e.w"),
    ],
)
def test_a_rename_takes_whole_names_the_longest_first(rename: dict, name: str, expected: str) -> None:
    assert renamed(name, rename) == expected


def test_nothing_is_matched_by_position() -> None:
    source = Source(first=torch.ones(3), second=torch.zeros(3))
    out = torch.empty(3)
    matched(source, wanted(second=(3,), first=(3,))).read("second", "param", start=0, out=out)
    assert torch.equal(out, torch.zeros(3))
    with pytest.raises(CheckpointError) as raised:
        matched(source, wanted(other=(3,), second=(3,)))
    assert "other: parameter (3,) float32" in str(raised.value) and "first: parameter (3,)" in str(raised.value)


def test_another_model_of_thousands_of_names_is_reported_whole_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda name, *_, **__: searched.append(name) or [])
    source = Source(**{f"encoder__{i}__weight": torch.ones(1) for i in range(2000)})
    with pytest.raises(CheckpointError) as raised:
        matched(source, wanted(**{f"decoder__{i}__weight": (1,) for i in range(2000)}))
    assert len(str(raised.value).splitlines()) == 4000 + 4
    assert len(searched) == 20, "each search takes all names"


def test_a_renamed_checkpoint_is_resumed_with_the_same_configuration() -> None:
    want = wanted(new__w=(2,))
    rename = {"old": "new"}
    for source in (Source(old__w=torch.ones(2)), Source(new__w=torch.ones(2))):
        out = torch.empty(2)
        matched(source, want, rename).read("new.w", "param", start=0, out=out)
        assert torch.equal(out, torch.ones(2))


def test_a_rename_that_cannot_be_meant_is_in_the_report() -> None:
    with pytest.raises(CheckpointError, match=r"odl: not in the checkpoint; nearest: old"):
        matched(Source(old=torch.ones(2)), wanted(old=(2,)), {"odl": "other"})
    with pytest.raises(CheckpointError, match=r"would both be new \(param\)"):
        matched(Source(old=torch.ones(2), new=torch.ones(2)), wanted(new=(2,)), {"old": "new"})


def test_a_parameter_that_became_a_buffer_has_its_name_still() -> None:
    out = torch.empty(2)
    matched(Source(w=torch.ones(2)), {("w", "buffer"): TensorInfo((2,), torch.float32)}).read(
        "w", "buffer", start=0, out=out
    )
    assert torch.equal(out, torch.ones(2))


@pytest.mark.parametrize(
    ("saved", "declared", "same"),
    [
        (torch.float32, torch.float64, False),
        (torch.float64, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),  # frozen under an engine that computes in bf16
        (torch.int64, torch.float32, False),
    ],
)
def test_a_retyped_parameter(saved: torch.dtype, declared: torch.dtype, same: bool) -> None:
    source, want = Source(w=torch.ones(2).to(saved)), {("w", "param"): TensorInfo((2,), declared)}
    if same:
        assert matched(source, want).missing == []
        return
    with pytest.raises(
        CheckpointError, match=rf"w: type {saved} in the checkpoint, .* in the model".replace("torch.", "")
    ):
        matched(source, want)
    assert matched(source, want, allow=["w"]).missing == ["w"]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"a": "b", "b": "c"}, "would be renamed again by b"),
        ({"a": "a.b"}, "would be renamed again by a"),
        ({"a.": "b"}, "without a dot at the end"),
        ({"a": ""}, "must name what it becomes"),
    ],
)
def test_a_rename_that_would_not_survive_a_resume_is_refused(rename: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed.make_config("ddp", {"rename": rename})


def test_renames_survive_the_frozen_configuration() -> None:
    config = changed.make_config("ddp", {"rename": changed.RENAME, "allow_missing": changed.ALLOW_MISSING})
    assert from_yaml(to_yaml(config)).checkpoint == config.checkpoint
    assert config.checkpoint.rename == {"model.head": "model.output"}


# Engines


def train_and_save(world: World, engine: str, folder: Path) -> list:
    config = toy.make_config(engine)
    built = toy.build(world, config)
    for step in range(3):
        built.train_step(toy.micro_batches(config, world, step))
    save(LocalStore(folder), built.shards(), world=world, step=3, samples_seen=0, trainer={}, origin=ORIGIN)
    shards = toy.clone_shards(built)
    built.close()
    return shards


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of zero2 on 2 ranks, and what it holds."""
    folder = tmp_path_factory.mktemp("written")
    return folder, toy.whole_tensors(ranks(2).run(train_and_save, "zero2", folder))


def refused(world: World, engine: str, folder: Path) -> str:
    built = toy.build(world, changed.make_config(engine, {}))
    try:
        built.load(Checkpoint(folder / "step-00000003"), num_updates=3)
    except CheckpointError as error:
        return str(error)
    finally:
        built.close()
    return ""


def load_changed(world: World, engine: str, folder: Path, precision: str) -> dict:
    """Load what fits, train one step, save, and load that with the same configuration."""
    config = changed.make_config(
        engine, {"rename": changed.RENAME, "allow_missing": changed.ALLOW_MISSING}, precision=precision
    )
    built = toy.build(world, config)
    initial = toy.clone_shards(built)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built.load(Checkpoint(folder / "step-00000003"), num_updates=3)
    loaded = toy.clone_shards(built)
    report = built.train_step(toy.micro_batches(config, world, 3))
    store = LocalStore(folder)
    save(store, built.shards(), world=world, step=4, samples_seen=0, trainer={}, origin=ORIGIN)
    trained = toy.clone_shards(built)
    built.close()
    again = toy.build(world, config)
    found = select(store, world=world).checkpoint
    assert found is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.load(found, num_updates=4)
    result = {
        "initial": initial,
        "loaded": loaded,
        "trained": trained,
        "again": toy.clone_shards(again),
        "loss": report.loss,
        "notes": [str(w.message) for w in caught if "checkpoint" in str(w.message)],
    }
    again.close()
    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_all_differences_are_in_one_report_on_every_rank(ranks, written, engine: str) -> None:
    reports = ranks(2).run(refused, engine, written[0])
    assert reports[0] == reports[1]
    assert reports[0].splitlines()[:-1] == [
        "the checkpoint does not fit the model:",
        " only in the model:",
        "  model.output.weight: parameter (2, 5) float32; nearest in the checkpoint: model.head.weight (2, 5) float32",
        "  model.output.bias: parameter (2,) float32; nearest in the checkpoint: model.head.bias (2,) float32",
        "  model.extra.weight: parameter (5, 5) float32; nearest in the checkpoint: model.head.weight (2, 5) float32",
        "  model.extra.bias: parameter (5,) float32; nearest in the checkpoint: model.head.bias (2,) float32",
        " only in the checkpoint:",
        "  model.gain: parameter (1,) float32",
        "  model.head.bias: parameter (2,) float32",
        "  model.head.weight: parameter (2, 5) float32",
        " changed:",
        "  model.frozen: shape (3,) in the checkpoint, (4,) in the model",
        "  model.num_calls: type int64 in the checkpoint, float32 in the model",
    ]
    assert "checkpoint.rename" in reports[0] and "checkpoint.allow_missing" in reports[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_fits_is_taken_and_the_rest_begins(ranks, written, tmp_path: Path, engine: str, precision: str) -> None:
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    results = ranks(2).run(load_changed, engine, tmp_path, precision)
    initial, loaded, trained, again = (
        toy.whole_tensors([result[name] for result in results]) for name in ("initial", "loaded", "trained", "again")
    )
    for key, value in written[1].items():
        ours = key.replace("model.head", "model.output")
        if not ours.startswith(("model.gain", "model.frozen", "model.num_calls")):
            assert torch.equal(loaded[ours], value), ours
    for key in ("model.extra.weight:param", "model.extra.bias:param", "model.frozen:param", "model.num_calls:buffer"):
        assert torch.equal(loaded[key], initial[key]), key
    for kind in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"):
        assert not loaded[f"model.extra.weight:{kind}"].any()
    assert {float(value) for key, value in loaded.items() if key.endswith(":step")} == {3.0}
    assert torch.isfinite(torch.tensor(results[0]["loss"]))
    assert not torch.equal(trained["model.extra.weight:param"], initial["model.extra.weight:param"])
    assert trained.keys() == again.keys()
    for key, value in trained.items():
        assert torch.equal(again[key], value), key
    missing, unused = results[1]["notes"]
    assert "nothing that fits model.frozen, model.extra.weight, model.extra.bias, model.num_calls" in missing
    assert unused.startswith("model.gain of the checkpoint")


def load_lazily(world: World, folder: Path) -> dict[str, list[float]]:
    """AdamW creates states at the first gradient: those of a new parameter must be whole, or it would fail."""
    config = changed.make_config(
        "ddp",
        {"rename": changed.RENAME, "allow_missing": changed.ALLOW_MISSING},
        optimizer={"_target_": "torch.optim.AdamW"},
    )
    built = toy.build(world, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built.load(Checkpoint(folder / "step-00000003"), num_updates=3)
    built.train_step(toy.micro_batches(config, world, 3))
    steps = {s.fqn: float(s.tensor) for s in built.shards() if s.kind == "step"}
    built.close()
    return steps


AVERAGING = {"decay": 0.9}
EMAS = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")


def save_adamw(world: World, folder: Path) -> None:
    config = toy.make_config("ddp", optimizer={"_target_": "torch.optim.AdamW"}, weight_averaging=AVERAGING)
    built = toy.build(world, config)
    for step in range(3):
        built.train_step(toy.micro_batches(config, world, step))
    save(LocalStore(folder), built.shards(), world=world, step=3, samples_seen=0, trainer={}, origin=ORIGIN)
    built.close()


@pytest.fixture(scope="module")
def of_adamw(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamw")
    ranks(1).run(save_adamw, folder)
    return folder


def test_states_that_appear_at_the_first_gradient(ranks, of_adamw: Path) -> None:
    (steps,) = ranks(1).run(load_lazily, of_adamw)
    assert steps["model.extra.weight"] == steps["model.blocks.0.weight"] == 4.0


# Another optimizer


def go_on_with(world: World, engine: str, folder: Path, optimizer: dict | None) -> dict:
    """Load what :func:`save_adamw` has saved into a run with AdEMAMix, and take a step."""
    training = {"weight_averaging": AVERAGING, **({"optimizer": optimizer} if optimizer else {})}
    config = toy.make_config(engine, **training)
    built = toy.build(world, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built.load(Checkpoint(folder / "step-00000003"), num_updates=3)
    loaded = toy.clone_shards(built)
    report = built.train_step(toy.micro_batches(config, world, 3))
    kinds = {shard.kind for shard in built.shards()} | built.memory().states.keys()
    built.close()
    return {"loaded": loaded, "kinds": kinds, "notes": [str(w.message) for w in caught], "loss": report.loss}


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_from_adamw_to_ademamix(ranks, of_adamw: Path, engine: str) -> None:
    results = ranks(2).run(go_on_with, engine, of_adamw, None)
    loaded = toy.whole_tensors([result["loaded"] for result in results])
    saved = Checkpoint(of_adamw / "step-00000003")
    for (fqn, kind), info in saved.tensors().items():
        ours = f"{fqn}:{'exp_avg_fast' if kind == 'exp_avg' else kind}"
        out = torch.empty(math.prod(info.global_shape), dtype=info.dtype)
        saved.read(fqn, kind, start=0, out=out)
        assert torch.equal(loaded[ours].flatten().double(), out.double()), ours
    assert not any(value.any() for key, value in loaded.items() if key.endswith("exp_avg_slow"))
    for result in results:
        assert result["kinds"] - {"buffer"} == {"param", "weight_average", "step", *EMAS}
        assert "exp_avg of the checkpoint continues as exp_avg_fast" in result["notes"]
        assert any("no exp_avg_slow" in note and "schedule_start=3" in note for note in result["notes"])


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("target", "taken", "note"),
    [
        (
            {"_target_": "torch.optim.AdamW"},
            {"exp_avg", "exp_avg_sq", "step"},
            "exp_avg_fast of the checkpoint continue",
        ),
        ({"_target_": "torch.optim.AdamW", "amsgrad": True}, set(), "this one needs max_exp_avg_sq"),
        ({"_target_": "torch.optim.NAdam"}, set(), "this one needs mu_product"),
        ({"_target_": "torch.optim.SGD"}, set(), "the optimizer has no exp_avg_fast, exp_avg_slow, exp_avg_sq, step"),
        ({"_target_": "torch.optim.SGD", "momentum": 0.9}, set(), "this one needs momentum_buffer"),
    ],
    ids=["AdamW", "AMSGrad", "NAdam", "SGD", "momentum"],
)
def test_from_ademamix_to_another(ranks, written, engine: str, target: dict, taken: set, note: str) -> None:
    results = ranks(2).run(go_on_with, engine, written[0], target)
    loaded = toy.whole_tensors([result["loaded"] for result in results])
    assert {key.split(":")[1] for key in loaded} - {"param", "buffer", "weight_average"} == taken
    for key, value in written[1].items():
        fqn, kind = key.split(":")
        ours = f"{fqn}:{'exp_avg' if kind == 'exp_avg_fast' else kind}"
        if ours in loaded:
            assert torch.equal(loaded[ours].double(), value.double()), ours
    for result in results:
        assert any(note in text for text in result["notes"]), result["notes"]
        assert math.isfinite(result["loss"])


def test_a_step_alone_is_not_taken() -> None:
    """RMSprop's: with a second moment of zero at a late step, the first updates would be many times too large."""
    source = Source()
    source._held = {("w", kind): torch.zeros(2) for kind in ("param", "square_avg", "step")}
    matched = match(source, {("w", "param"): TensorInfo((2,), torch.float32)}, rename={}, allow_missing=[])
    matched.select_states(["exp_avg_slow", "exp_avg_sq", "step"], FROM_ADAMW, required={"exp_avg_sq"})
    assert matched.tensors().keys() == {("w", "param")}
    assert "this one needs exp_avg_sq: its states begin at zero" in matched.notes()[0]


def test_states_that_the_optimizer_does_not_know_are_left(ranks, written) -> None:
    optimizer = {**toy.make_config("ddp").training.optimizer, "betas": [0.0, 0.999, 0.9999]}
    (result,) = ranks(1).run(go_on_with, "ddp", written[0], optimizer)
    assert "the optimizer has no exp_avg_fast: not taken from the checkpoint" in result["notes"]
    assert result["kinds"] == {"param", "weight_average", "buffer", "step", "exp_avg_slow", "exp_avg_sq"}


def test_renaming_states_needs_a_checkpoint_with_no_others() -> None:
    held = {("w", kind): torch.zeros(2) for kind in ("param", "exp_avg", "exp_avg_sq", "something")}
    source = Source()
    source._held = held
    matched = match(source, {("w", "param"): TensorInfo((2,), torch.float32)}, rename={}, allow_missing=[])
    matched.select_states(["exp_avg_fast", "exp_avg_sq"], FROM_ADAMW)
    assert matched.tensors().keys() == {("w", "param"), ("w", "exp_avg_sq")}
    assert matched.notes() == ["the optimizer has no exp_avg, something: not taken from the checkpoint"]
