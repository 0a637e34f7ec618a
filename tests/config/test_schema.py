from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anemoi_dist.config.batch import BatchPlan, plan_batches
from anemoi_dist.config.parse import from_container, from_yaml, nearest_keys, schema_keys, to_yaml
from anemoi_dist.config.schema import Config, TaskConfig, TrainingConfig
from anemoi_dist.errors import ConfigError

MINIMAL = {
    "training": {"max_steps": 10, "global_batch_size": 8, "optimizer": {"_target_": "torch.optim.AdamW"}},
    "engine": {"kind": "ddp"},
    "data": {"kind": "synthetic"},
    "model": {"_target_": "some.Model"},
}


def minimal(**nodes):
    return {name: {**MINIMAL.get(name, {}), **nodes.get(name, {})} for name in {*MINIMAL, *nodes}}


def batch(total: int, micro: int | None = None, **task) -> Config:
    training = TrainingConfig(max_steps=1, global_batch_size=total, micro_batch_size=micro, optimizer={"_target_": "x"})
    return Config(training=training, task=TaskConfig(**task))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"when_busy": "queue"}, "when_busy='queue'.*not a valid name"),
        ({"on_error": "retry"}, "(?s)on_error='retry'.*valid: warn, stop"),
        ({"keep_every": 0}, "keep_every=0: must be at least 1"),
        ({"keep_every": 5, "keep_last": None}, "keep_every=5: has no effect while all are kept"),
        ({"keep_best": "rmse", "keep_last": None}, "keep_best='rmse': has no effect"),
        ({"keep_best": "mae"}, "(?s)keep_best='mae'.*valid: rmse, acc"),
        ({"keep_best": "acc", "interval_steps": 15}, "(?s)needs a score.*validation.interval_steps=15"),
        ({"interval_minutes": 0.0}, "interval_minutes=0.0: must be positive"),
        ({"url": "/scratch/runs"}, "url='/scratch/runs': must have a protocol"),
    ],
)
def test_checkpoint_keys_are_checked(checkpoint, message):
    with pytest.raises(ConfigError, match=message):
        from_container(minimal(checkpoint=checkpoint, validation={"interval_steps": 10}))


# Batches first: sizes follow from the ranks, or are refused with the nearest that work.


@settings(deadline=None)
@given(total=st.integers(1, 4096), world=st.integers(1, 512))
def test_every_plan_multiplies_to_the_global_batch(total, world):
    try:
        plan = plan_batches(batch(total), world_size=world)
    except ConfigError as error:
        assert total % world
        suggested = [int(word.rstrip(",")) for word in error.fix.split(", or a number")[0].split() if word[0].isdigit()]
        assert suggested
        for size in suggested:
            assert plan_batches(batch(size), world_size=world).global_size == size
            assert abs(size - total) < world
        ranks = [int(number) for number in error.fix.split(": ")[1].split(",")]
        for number in ranks:
            assert plan_batches(batch(total), world_size=number).global_size == total
    else:
        assert plan.global_size == total == plan.world_size * plan.accumulation * plan.micro_size
        assert plan.rank_size * world == total


@settings(deadline=None)
@given(total=st.integers(1, 1024), world=st.integers(1, 64), micro=st.integers(-2, 128))
def test_a_micro_batch_divides_or_is_refused_with_those_that_do(total, world, micro):
    share, rest = divmod(total, world)
    if rest:
        return
    try:
        plan = plan_batches(batch(total, micro), world_size=world)
    except ConfigError as error:
        assert error.key == "training.micro_batch_size"
        for size in (int(number) for number in error.fix.removeprefix("use one of ").split(",")):
            fitting = plan_batches(batch(total, size), world_size=world)
            assert fitting == BatchPlan(total, size, share // size, world)
    else:
        assert plan == BatchPlan(total, micro, share // micro, world)


# Types and keys


def test_the_smallest_configuration():
    config = from_container(minimal())
    assert isinstance(config, Config)
    assert config.training.lr.rate == 1e-3
    assert config.run.id is None


def test_unknown_keys_are_all_named():
    with pytest.raises(ConfigError) as caught:
        from_container(minimal(training={"lr": {"rte": 1}}, telemetry={"tensorbord": True}))
    message = str(caught.value)
    assert "training.lr.rte" in message
    assert "telemetry.tensorbord" in message


@pytest.mark.parametrize("missing", ["training.max_steps", "training.optimizer", "engine.kind", "data.kind", "model"])
def test_mandatory_keys(missing):
    container = minimal()
    node, _, leaf = missing.rpartition(".")
    del (container[node] if node else container)[leaf]
    with pytest.raises(ConfigError, match="is mandatory") as caught:
        from_container(container)
    assert caught.value.key == missing
    assert "for example" in caught.value.fix


def ademamix(state_dtype, **more):
    target = "anemoi_dist.optimizers.AdEMAMix"
    return {"training": {"optimizer": {"_target_": target, "state_dtype": state_dtype, **more}}}


@pytest.mark.parametrize(
    ("node", "rule"),
    [
        ({"engine": {"kind": "ddp", "stage": 2}}, "has no effect with engine.kind=ddp"),
        ({"engine": {"kind": "fsdp2", "options": {"a": 1}}}, "has no effect with engine.kind=fsdp2"),
        ({"engine": {"kind": "deepspeed", "stage": 2, "offload": True}}, "needs ZeRO stage 3"),
        ({"engine": {"kind": "deepspeed", "stage": 3, "overlap": True}}, "which gathers nothing by our own plan"),
        ({"engine": {"kind": "ddp", "overlap": True}}, "engine=zero1, engine=zero2 or engine=fsdp2"),
        ({"engine": {"kind": "megatron"}}, "is not a valid name"),
        ({"training": {"clip_grad_norm": 0}}, "must be positive"),
        ({"training": {"clip_grad_value": -1}}, "must be positive"),
        ({"checkpoint": {"init_optimizer": True}}, "without checkpoint.init_from"),
        (
            {"checkpoint": {"init_from": "a"}, "task": {"settings": {"system": {"input": {"warm_start": "b"}}}}},
            "besides system.input.warm_start",
        ),
        ({"training": {"weight_averaging": {"decay": 1.0}}}, "at least 0 and below 1"),
        ({"training": {"clip_grad_norm": 1.0, "clip_grad_value": 1.0}}, "choose one"),
        ({"training": {"clip_grad_norm": float("nan")}}, "must be positive"),
        ({"training": {"lr": {"scale_with": "gpus"}}}, "is not a valid name"),
        ({"task": {"inference": True}}, "does not say which inference files to write"),
        ({"training": {"optimizer": {"lr": 1}}}, "import path"),
        ({"training": {"optimizer": {"_target_": 5}}}, "import path"),
        ({"training": {"scheduler": {"a": 1}}}, "import path"),
        (ademamix("bf61"), "training.optimizer.state_dtype='bf61': is no type of states"),
        (ademamix(None), "state_dtype=None: is no type of states"),
        (ademamix({"exp_avg_slow": "fp8"}), "state_dtype.exp_avg_slow='fp8'"),
        (ademamix({"exp_avg": "bf16"}), "state_dtype='exp_avg': is no EMA state"),
        (ademamix({"exp_avg_fast": "bf16"}, betas=[0.0, 0.9, 0.9]), "there is no fast EMA"),
        ({"run": {"seed": -1}}, "at least 0"),
        ({"run": {"seed": "one"}}, "an integer"),
        ({"run": 5}, "must be a mapping"),
        ({"engine": None}, "must be a mapping"),
        ({"data": {"num_workers": -1}}, "at least 0"),
        ({"data": {"train": {"start": [1]}}}, "a text or null"),
        ({"launcher": {"ranks": 0}}, "at least 1"),
        ({"checkpoint": {"keep_last": 0}}, "at least 1"),
        ({"security": {"allowed_targets": "torch"}}, "must be a list"),
        ({1: 2}, "is not a configuration key"),
    ],
)
def test_rules(node, rule):
    container = minimal()
    for name, value in node.items():
        container[name] = {**container.get(name, {}), **value} if isinstance(value, dict) else value
    if "optimizer" in (node.get("training") or {}):
        container["training"]["optimizer"] = node["training"]["optimizer"]
    with pytest.raises(ConfigError) as caught:
        from_container(container)
    message = str(caught.value)
    assert rule in message
    assert len(message.splitlines()) <= 3, message


def test_nearest_keys():
    keys = list(schema_keys())
    assert nearest_keys("rate", keys) == ["training.lr.rate"]
    assert (
        nearest_keys("training.lr.interval_steps", keys) == [key for key in keys if key.endswith(".interval_steps")][:3]
    )
    assert nearest_keys("trainin.max_step", keys)[0] == "training.max_steps"
    assert nearest_keys("zzzzzz", keys) == []


# The frozen file

json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "${" not in text and text != "???"),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), children, max_size=3)
    ),
    max_leaves=8,
)


# Most of the time goes to the keys of the schema: many values in one file.
@settings(deadline=None, max_examples=10)
@given(values=st.lists(json_like, min_size=1, max_size=4))
def test_frozen_yaml_round_trip(values):
    config = from_container(minimal(model={"arguments": values, "argument": values[0]}))
    config.data.dataset = values[-1]
    assert from_yaml(to_yaml(config)) == config


def test_texts_stay_texts():
    texts = [
        "1e-3",
        "null",
        "yes",
        "0x10",
        "2025-12-01",
        "1_000",
        "~",
        "",
        " a ",
        "a: b",
        "# no",
        "'",
        "é\u2028",
        "\x85",
        "é\x85 ",
    ]
    options = {f"key{index}": text for index, text in enumerate(texts)}
    again = from_yaml(to_yaml(from_container(minimal(data={"dataset": texts, "options": options}))))
    assert again.data.dataset == texts
    assert again.data.options == options


def test_schema_keys_cover_the_dataclasses():
    def leaf_names(node, prefix=""):
        for item in dataclasses.fields(node):
            value = getattr(node, item.name, None)
            yield from (
                leaf_names(value, f"{prefix}{item.name}.") if dataclasses.is_dataclass(value) else [prefix + item.name]
            )

    assert set(leaf_names(from_container(minimal()))) <= set(schema_keys())


def test_no_torch():
    code = "import sys, anemoi_dist.config.schema, anemoi_dist.config.compose; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
