"""The typed configuration: what every key means, its default, and every check that spans several keys.

Hydra composes plain YAML (``compose.py``); this module gives it types and refuses what cannot work, before a GPU or a
queue is touched. It imports no torch: the control side uses it on a login node.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from anemoi_dist.config.launcher_checks import check_launcher, check_lines
from anemoi_dist.config.optimizer_states import checked_state_dtype, is_ademamix
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import check_run_id

PRECISIONS = ("fp32", "bf16")
LR_SCALINGS = ("none", "world_size")
ENGINE_KINDS = ("ddp", "deepspeed", "fsdp2")
DATA_KINDS = ("anemoi", "synthetic")
LAUNCHER_KINDS = ("local", "slurm", "mpi")
RANKS_BY = ("torchrun", "srun")
SAVE_WHEN_BUSY = ("wait", "skip")
SAVE_ON_ERROR = ("warn", "stop")
SAVE_METRICS = ("rmse", "acc")
#: What an existing run may only change when ``run.allow_changed`` names it, with the keys that each name stands for.
GUARDED = {"model": "model", "data": "data", "seed": "run.seed"}


@dataclass
class RunConfig:
    """Which run this is. ``id`` null: derived from the configuration, so that the same command continues it."""

    root: str = "runs"
    id: str | None = None
    seed: int = 0
    #: ``model``, ``data``, ``seed``: may differ from what this run was started with.
    allow_changed: list[str] = field(default_factory=list)


@dataclass
class LrConfig:
    """Learning rate: a function of this block and the optimizer step, nothing else."""

    rate: float = 1e-3
    #: Optimizer steps of the cosine; null: ``training.max_steps``.
    iterations: int | None = None
    #: Rate at the end of the cosine.
    min: float = 0.0
    #: Optimizer steps of linear warm-up.
    warmup: int = 0
    #: ``world_size`` multiplies ``rate`` (not ``min``) by the number of data-parallel ranks, as anemoi-training does.
    scale_with: str = "none"


@dataclass
class TrainingConfig:
    """What is optimized and for how long."""

    max_steps: int = MISSING
    global_batch_size: int = MISSING
    #: Samples that one rank holds in one forward pass; null: all of its share of the global batch.
    micro_batch_size: int | None = None
    #: Forecast steps that the loss rolls out.
    rollout: int = 1
    lr: LrConfig = field(default_factory=LrConfig)
    #: ``_target_`` and its arguments; ``params`` and ``lr`` are injected.
    optimizer: dict[str, Any] = MISSING
    #: ``_target_`` and its arguments; null: a constant rate.
    scheduler: dict[str, Any] | None = None
    #: Largest global L2 norm of the gradient; null: no clipping.
    clip_grad_norm: float | None = None
    precision: str = "fp32"
    #: Updates in a row that may be skipped for a loss or gradient that is not finite, before the run ends (code 5).
    max_skipped: int = 10


@dataclass
class EngineConfig:
    """How parameters, gradients and optimizer states are spread over ranks."""

    kind: str = MISSING
    #: ZeRO stage, for ``kind: deepspeed``.
    stage: int = 0
    #: Keep the optimizer's states and its step on the CPU (ZeRO 3).
    offload: bool = False
    #: Gather the working parameters of what has been stepped while the rest is stepped (ZeRO 1 and 2, FSDP2).
    overlap: bool = False
    #: Further keys of DeepSpeed's own configuration, merged over ours.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SplitConfig:
    """First and last date (inclusive) of one block of the dataset; null: as far as it goes."""

    start: str | None = None
    end: str | None = None


@dataclass
class DataConfig:
    """What is read. ``dataset`` takes whatever ``anemoi.datasets.open_dataset`` takes."""

    kind: str = MISSING
    #: Path, name, list or dictionary for ``open_dataset``; for ``kind: synthetic`` its shape.
    dataset: Any = None
    #: Further options of ``open_dataset`` (``select``, ``frequency``, ``missing_dates``, ...).
    options: dict[str, Any] = field(default_factory=dict)
    train: SplitConfig = field(default_factory=SplitConfig)
    validation: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)
    #: Variables that are given, not forecast (sun, orography, ...).
    forcing: list[str] = field(default_factory=list)
    #: Past states that the model sees.
    multistep_input: int = 2
    num_workers: int = 1
    #: Batches that each worker reads ahead.
    prefetch_factor: int = 2


@dataclass
class ValidationConfig:
    """When and on what the forecast is scored."""

    #: Optimizer steps between validations; null: only at the end.
    interval_steps: int | None = None
    #: Forecast steps to score, 1 is the first.
    lead_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    #: Samples scored at most, evenly spaced; null: all.
    max_samples: int | None = None


@dataclass
class CheckpointConfig:
    """When the run is saved and what is kept. The end of a run is always saved."""

    #: Optimizer steps between checkpoints; null: none but those of ``interval_minutes`` and the end.
    interval_steps: int | None = None
    #: Minutes between checkpoints, by the clock of rank 0; null: only ``interval_steps`` counts.
    interval_minutes: float | None = None
    #: Newest checkpoints to keep; null: all.
    keep_last: int | None = 3
    #: Keep, for ever, the checkpoints whose step is a multiple of this.
    keep_every: int | None = None
    #: Keep the best by ``rmse`` or ``acc`` on the validation block; null: none for that.
    keep_best: str | None = None
    #: Write in a thread while training goes on, from a copy in host memory.
    asynchronous: bool = True
    #: What a checkpoint does that is due while one is being written: ``wait`` for it, or ``skip``.
    when_busy: str = "wait"
    #: What a checkpoint that could not be written does: ``warn`` and train on, or ``stop`` the run (code 4).
    on_error: str = "warn"
    #: Read every file back and check it before it is committed.
    read_back: bool = True
    #: Where fsspec keeps checkpoints, below it one prefix a run (``s3://bucket/runs``); null: in the run directory.
    url: str | None = None
    #: Refuse to go on where the newest checkpoint is damaged, instead of taking the one before.
    strict: bool = False
    #: Old name, or prefix before a dot, of parameters and buffers in the checkpoint -> name in the model.
    rename: dict[str, str] = field(default_factory=dict)
    #: Patterns of parameters and buffers that the model or the checkpoint may have alone, or that have changed.
    allow_missing: list[str] = field(default_factory=list)


@dataclass
class TelemetryConfig:
    """What is shown and recorded."""

    #: Optimizer steps between lines, events and metrics.
    interval_steps: int = 10
    tensorboard: bool = False


@dataclass
class SlurmConfig:
    """What a SLURM cluster wants to know of a job. Null and empty: the cluster's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    #: Any other ``#SBATCH`` option by its long name, without dashes: ``{mem: 64G, exclusive: true}``.
    options: dict[str, Any] = field(default_factory=dict)
    #: Modules to load in the job.
    modules: list[str] = field(default_factory=list)
    #: Shell lines of the batch script that run before anything of ours.
    setup: list[str] = field(default_factory=list)
    #: Network interface that NCCL and gloo use between nodes.
    interface: str | None = None
    #: Seconds before the time limit at which the run is asked to save; SLURM may be 60 s early.
    signal_s: int = 300


@dataclass
class LauncherConfig:
    """Where ranks run, and how often they are started again."""

    kind: str = "local"
    nodes: int = 1
    #: Ranks on each node; null: one a GPU, or 2 where there is none.
    ranks: int | None = None
    #: GPUs that each node gives to the job; null: those of this machine, or none.
    gpus_per_node: int | None = None
    #: Time limit of one job (``HH:MM:SS`` or ``D-HH:MM:SS``); null: the queue's.
    time: str | None = None
    #: Times that the ranks are started again after a crash or a hang, without leaving the machine or the allocation.
    max_restarts: int = 0
    #: Seconds before the first of these restarts; each further one waits twice as long, 60 s at most.
    backoff_s: float = 1.0
    #: Times that a job goes back into the queue after a time limit or a preemption.
    max_requeues: int = 100
    #: Times that a job goes back into the queue after a crash, as long as each life made progress.
    max_retries: int = 3
    #: Ranks look at each other before they train (versions, clocks, disk, collectives), as ``anemoi-dist doctor`` does.
    preflight: bool = False
    #: What starts the ranks of a node in a SLURM job: one ``torchrun``, or one ``srun`` task a rank.
    ranks_by: str = "torchrun"
    #: File with one host a line, for mpirun; null: this machine, or the hosts of the job it is started in.
    hostfile: str | None = None
    #: Name of a file in ``slurm/profiles``, or a path: the cluster's values for this group.
    profile: str | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class WatchdogConfig:
    """What counts as a hang."""

    #: Seconds without a sign of life from a rank until its stacks are dumped and the run ends with code 6; null: never.
    timeout_s: float | None = 1800.0


@dataclass
class SecurityConfig:
    """Import prefixes that ``_target_`` may name, beside the built-in ones."""

    allowed_targets: list[str] = field(default_factory=list)


@dataclass
class Config:
    """The whole configuration of a run, as frozen in ``config.yaml``."""

    run: RunConfig = field(default_factory=RunConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    #: ``_target_`` and its arguments.
    model: dict[str, Any] = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is cut: ``global_size = world_size * accumulation * micro_size``."""

    global_size: int
    micro_size: int
    accumulation: int
    world_size: int

    @property
    def rank_size(self) -> int:
        """Samples that one rank sees in one optimizer step."""
        return self.micro_size * self.accumulation


def plan_batches(training: TrainingConfig, *, world_size: int) -> BatchPlan:
    """Cut ``training.global_batch_size`` over the ranks.

    Raises
    ------
    ConfigError
        The sizes do not divide; the message names the nearest that do.
    """
    total = training.global_batch_size
    if total % world_size:
        lower, upper = total // world_size * world_size, (total // world_size + 1) * world_size
        nearest = " or ".join(str(size) for size in (lower, upper) if size > 0)
        raise ConfigError(
            "training.global_batch_size",
            total,
            f"must be a multiple of the {world_size} ranks",
            fix=f"use {nearest}, or a number of ranks that divides {total}: {_divisors(total)}",
        )
    share = total // world_size
    micro = share if training.micro_batch_size is None else training.micro_batch_size
    if micro < 1 or share % micro:
        raise ConfigError(
            "training.micro_batch_size",
            micro,
            f"must divide the {share} samples that each of {world_size} ranks gets of "
            f"training.global_batch_size={total}",
            fix=f"use one of {_divisors(share)}",
        )
    return BatchPlan(total, micro, share // micro, world_size)


def engine_name(engine: EngineConfig) -> str:
    """Return the name by which ``engine=`` chooses this engine."""
    if engine.kind != "deepspeed":
        return engine.kind
    return f"zero{engine.stage}" + ("_offload" if engine.offload else "")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def from_container(container: dict[str, Any]) -> Config:
    """Give a composed configuration its types and check it.

    Parameters
    ----------
    container : dict[str, Any]
        Plain dictionaries, lists and scalars, interpolations resolved.

    Raises
    ------
    ConfigError
        A key is unknown or has no value, a value has the wrong type or breaks a rule.
    """
    refuse_unknown(container)
    refuse_missing(container)
    _refuse_scalar_nodes(container)
    check_lines(container.get("launcher", {}).get("slurm", {}).get("setup"))  # typed, false would be a text
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), container)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise _missing(missing[0])
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _wrong_type(error, container) from error
    assert isinstance(config, Config)
    check(config)
    return config


def refuse_missing(container: dict[str, Any], prefix: str = "") -> None:
    """Raise :class:`ConfigError` for the first mandatory value (``???``) that nobody gave."""
    for name, value in container.items():
        if isinstance(value, dict):
            refuse_missing(value, f"{prefix}{name}.")
        elif value == MISSING:
            raise _missing(f"{prefix}{name}")


@functools.cache
def schema_keys() -> Mapping[str, Any]:
    """Return every dotted key that the schema knows with its type, nodes before what is in them."""
    return MappingProxyType(dict(_walk_schema(Config, "")))


def _walk_schema(node: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(node)
    for item in fields(node):
        yield prefix + item.name, hints[item.name]
        if is_dataclass(hints[item.name]):
            yield from _walk_schema(hints[item.name], f"{prefix}{item.name}.")


def refuse_unknown(container: dict[str, Any], *, origin: str = "") -> None:
    """Raise :class:`ConfigError` for keys that the schema does not know, naming the nearest valid ones.

    Parameters
    ----------
    container : dict[str, Any]
        A configuration or a part of one, from its root on.
    origin : str, optional
        Where it was read, for the message.
    """
    unknown = list(unknown_keys(container))
    if unknown:
        key, value = unknown[0]
        raise unknown_key(key, value, others=[other for other, _ in unknown[1:]], origin=origin)


def unknown_keys(container: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what the schema does not know; inside free-form nodes everything is known."""
    schema = schema_keys()

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key not in schema:
                yield key, value
            elif isinstance(value, dict) and is_dataclass(schema[key]):
                yield from walk(value, f"{key}.")

    return walk(container, "")


def unknown_key(
    key: str, value: Any, *, known: Iterable[str] = (), others: Sequence[str] = (), origin: str = "", hint: str = ""
) -> ConfigError:
    """Return the error for a key that does not exist.

    Parameters
    ----------
    key : str
        The dotted key.
    value : Any
        What it was to be set to.
    known : Iterable[str], optional
        Keys that exist beside the schema's.
    others : Sequence[str], optional
        Further unknown keys, listed in the same message.
    origin : str, optional
        Where it was read.
    hint : str, optional
        Another way to mend it.
    """
    keys = [*schema_keys(), *known]
    rule = "is not a configuration key" + (f" (in {origin})" if origin else "")
    if others:
        rule += f", nor are: {', '.join(others)}"
    near = nearest_keys(key, keys)
    parent = key.rpartition(".")[0]
    siblings = [name for name in keys if name.rpartition(".")[0] == parent]
    if near:
        fix = f"did you mean {' or '.join(near)}?"
    elif siblings and parent:
        names = dict.fromkeys(name.rpartition(".")[2] for name in siblings)
        fix = f"the keys of {parent} are {', '.join(names)}"
    else:
        fix = f"the top-level keys are {', '.join(item.name for item in fields(Config))}"
    return ConfigError(key, value, rule, fix="; ".join(filter(None, (fix, hint))))


def nearest_keys(key: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return the valid keys that ``key`` most probably meant: the same last name elsewhere, or a slip of the pen."""
    keys = list(dict.fromkeys(known))
    last = key.rpartition(".")[2]
    by_name: dict[str, list[str]] = {}
    for candidate in keys:
        by_name.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    if exact := by_name.get(last):
        return exact[:count]
    found = difflib.get_close_matches(key, keys, n=count, cutoff=0.85)
    for name in difflib.get_close_matches(last, by_name, n=count, cutoff=0.75):
        found += by_name[name]
    return list(dict.fromkeys(found))[:count]


_EXAMPLES = {
    "training.max_steps": "training.max_steps=1000",
    "training.global_batch_size": "training.global_batch_size=16",
    "training.optimizer": "training/optimizer=ademamix",
    "engine.kind": "engine=zero2",
    "data.kind": "data=era5_sample",
    "data.dataset": "data.dataset=/path/to/dataset.zarr",
    "model": "model=latlon",
}


def _missing(key: str) -> ConfigError:
    return ConfigError(
        key, "???", "is mandatory and has no value", fix=f"for example {_EXAMPLES.get(key, key + '=VALUE')}"
    )


def _wrong_type(error: OmegaConfBaseException, container: dict[str, Any]) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "configuration")
    value: Any = container
    for name in re.split(r"[.\[\]]+", key.rstrip("]")):
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
    expected = schema_keys().get(key)
    if expected is None:
        return ConfigError(key, value, str(error).splitlines()[0])
    fix = f"{key}={int(value)}" if isinstance(value, float) and value.is_integer() else ""
    return ConfigError(key, value, f"must be {_describe(expected)}", fix=fix)


def _refuse_scalar_nodes(container: dict[str, Any], prefix: str = "") -> None:
    schema = schema_keys()
    for name, value in container.items():
        expected = schema[f"{prefix}{name}"]
        if not is_dataclass(expected):
            continue
        if not isinstance(value, dict):
            fix = f"its keys are {', '.join(item.name for item in fields(expected))}"
            raise ConfigError(f"{prefix}{name}", value, f"must be {_describe(expected)}", fix=fix)
        _refuse_scalar_nodes(value, f"{prefix}{name}.")


def _describe(expected: Any) -> str:
    arguments = get_args(expected)
    if type(None) in arguments:
        return " or ".join([*(_describe(part) for part in arguments if part is not type(None)), "null"])
    if get_origin(expected) is list:
        return f"a list, each item {_describe(arguments[0])}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(expected, "a mapping of keys to values")


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML; :func:`from_yaml` gives it back."""
    structured = OmegaConf.structured(config)
    text = OmegaConf.to_yaml(structured)
    if "\x85" not in text:
        return text
    # YAML ends a line there. PyYAML writes it as if it did not, and reads it as a space; as an escape it comes back.
    container = OmegaConf.to_container(structured, enum_to_str=True)
    return str(yaml.dump(container, Dumper=get_omega_conf_dumper(), default_flow_style=False, sort_keys=False))


def from_yaml(text: str) -> Config:
    """Read a frozen configuration."""
    container = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert isinstance(container, dict)
    return from_container(container)  # type: ignore[arg-type]


def check(config: Config) -> None:
    """Raise :class:`ConfigError` for the first rule that the configuration breaks."""
    if config.run.id is not None:
        check_run_id(config.run.id)
    training, lr = config.training, config.training.lr
    _one_of("training.precision", training.precision, PRECISIONS)
    _one_of("training.lr.scale_with", lr.scale_with, LR_SCALINGS)
    _one_of("engine.kind", config.engine.kind, ENGINE_KINDS)
    _one_of("data.kind", config.data.kind, DATA_KINDS)
    _one_of("launcher.kind", config.launcher.kind, LAUNCHER_KINDS)
    _one_of("launcher.ranks_by", config.launcher.ranks_by, RANKS_BY)
    if config.launcher.hostfile is not None and config.launcher.kind != "mpi":
        rule = f"has no effect with launcher.kind={config.launcher.kind}"
        raise ConfigError("launcher.hostfile", config.launcher.hostfile, rule, fix="launcher=mpi, or leave it out")
    for name in config.run.allow_changed:
        _one_of("run.allow_changed", name, tuple(GUARDED))
    for key, value, lowest in (
        ("run.seed", config.run.seed, 0),
        ("training.max_steps", training.max_steps, 1),
        ("training.global_batch_size", training.global_batch_size, 1),
        ("training.rollout", training.rollout, 1),
        ("training.lr.iterations", lr.iterations, 1),
        ("training.lr.warmup", lr.warmup, 0),
        ("training.max_skipped", training.max_skipped, 0),
        ("data.multistep_input", config.data.multistep_input, 1),
        ("data.num_workers", config.data.num_workers, 0),
        ("data.prefetch_factor", config.data.prefetch_factor, 1),
        ("validation.interval_steps", config.validation.interval_steps, 1),
        ("validation.max_samples", config.validation.max_samples, 1),
        ("checkpoint.interval_steps", config.checkpoint.interval_steps, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("checkpoint.keep_every", config.checkpoint.keep_every, 1),
        ("telemetry.interval_steps", config.telemetry.interval_steps, 1),
        ("launcher.ranks", config.launcher.ranks, 1),
        ("launcher.nodes", config.launcher.nodes, 1),
        ("launcher.gpus_per_node", config.launcher.gpus_per_node, 0),
        ("launcher.max_restarts", config.launcher.max_restarts, 0),
        ("launcher.backoff_s", config.launcher.backoff_s, 0),
        ("launcher.max_requeues", config.launcher.max_requeues, 0),
        ("launcher.max_retries", config.launcher.max_retries, 0),
        ("launcher.slurm.signal_s", config.launcher.slurm.signal_s, 1),
    ):
        if value is not None and value < lowest:
            raise ConfigError(key, value, f"must be at least {lowest}", fix=f"{key}={lowest}")
    if not 0 < lr.rate < float("inf"):
        raise ConfigError("training.lr.rate", lr.rate, "must be a positive, finite number", fix="training.lr.rate=1e-3")
    if not 0 <= lr.min <= lr.rate:
        raise ConfigError(
            "training.lr.min", lr.min, f"must lie between 0 and training.lr.rate={lr.rate}", fix="training.lr.min=0"
        )
    if training.clip_grad_norm is not None and not 0 < training.clip_grad_norm < float("inf"):
        raise ConfigError(
            "training.clip_grad_norm", training.clip_grad_norm, "must be positive", fix="null switches clipping off"
        )
    timeout_s = config.watchdog.timeout_s
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise ConfigError("watchdog.timeout_s", timeout_s, "must be positive", fix="null switches the watchdog off")
    if not config.validation.lead_steps or min(config.validation.lead_steps) < 1:
        raise ConfigError(
            "validation.lead_steps",
            config.validation.lead_steps,
            "must be a list of steps from 1 on",
            fix="validation.lead_steps=[1,2,4]",
        )
    check_launcher(config.launcher)
    _check_rename(config.checkpoint.rename)
    _check_engine(config.engine)
    _check_checkpoint(config)
    _check_target("model", config.model)
    _check_target("training.optimizer", training.optimizer)
    if "lr" in training.optimizer:
        value = training.optimizer["lr"]
        raise ConfigError("training.optimizer.lr", value, "is injected", fix=f"training.lr.rate={value}")
    _check_state_dtype(training.optimizer)
    if training.scheduler is not None:
        _check_target("training.scheduler", training.scheduler)


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(key, value, "is not a valid name", valid=valid)


def _check_rename(rename: dict[str, str]) -> None:
    """Refuse renames that would be done again, to something else, when the renamed checkpoint is resumed."""
    for old, new in rename.items():
        key = f"checkpoint.rename.{old}"
        if not old or "" in old.split(".") or (new and "" in new.split(".")):
            raise ConfigError(key, new, "must be names, or prefixes without a dot at the end")
        if not new:
            raise ConfigError(key, new, "must name what it becomes", fix="checkpoint.rename={old: new}")
        for other in rename:
            if new == other or new.startswith(f"{other}."):
                raise ConfigError(
                    key, new, f"would be renamed again by {other} when the run is resumed", fix="choose another name"
                )


def _check_engine(engine: EngineConfig) -> None:
    if engine.stage not in (0, 1, 2, 3):
        raise ConfigError("engine.stage", engine.stage, "must be a ZeRO stage", valid=("0", "1", "2", "3"))
    if engine.kind != "deepspeed":
        for key, value in (("stage", engine.stage), ("offload", engine.offload), ("options", engine.options)):
            if value:
                raise ConfigError(
                    f"engine.{key}",
                    value,
                    f"has no effect with engine.kind={engine.kind}",
                    fix=f"engine={engine.kind}, or engine=zero1, zero2, zero3",
                )
    if engine.offload and engine.stage != 3:
        raise ConfigError("engine.offload", True, "needs ZeRO stage 3", fix="engine=zero3_offload")
    if engine.overlap and not (engine.kind == "fsdp2" or (engine.kind == "deepspeed" and engine.stage in (1, 2))):
        rule = f"has no effect with engine={engine_name(engine)}, which gathers nothing by our own plan"
        raise ConfigError("engine.overlap", True, rule, fix="engine=zero1, engine=zero2 or engine=fsdp2")


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    _one_of("checkpoint.when_busy", checkpoint.when_busy, SAVE_WHEN_BUSY)
    _one_of("checkpoint.on_error", checkpoint.on_error, SAVE_ON_ERROR)
    if checkpoint.url is not None and not re.match(r"[a-z0-9+.-]+://.", checkpoint.url):
        raise ConfigError(
            "checkpoint.url", checkpoint.url, "must have a protocol", fix=f"file://{checkpoint.url}, s3://..., or null"
        )
    minutes = checkpoint.interval_minutes
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ConfigError("checkpoint.interval_minutes", minutes, "must be positive", fix="null: by steps alone")
    for key in ("keep_every", "keep_best"):
        value = getattr(checkpoint, key)
        if value is not None and checkpoint.keep_last is None:
            raise ConfigError(
                f"checkpoint.{key}", value, "has no effect while all are kept", fix="checkpoint.keep_last=3"
            )
    if checkpoint.keep_best is None:
        return
    _one_of("checkpoint.keep_best", checkpoint.keep_best, SAVE_METRICS)
    interval, scored = checkpoint.interval_steps, config.validation.interval_steps
    if interval is not None and (scored is None or interval % scored):
        raise ConfigError(
            "checkpoint.keep_best",
            checkpoint.keep_best,
            f"needs a score for every checkpoint: checkpoint.interval_steps={interval} is no multiple of "
            f"validation.interval_steps={scored}",
            fix=f"validation.interval_steps={interval}",
        )


def _check_target(key: str, node: dict[str, Any]) -> None:
    if not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_", node.get("_target_"), "must be an import path such as torch.optim.AdamW")


def _check_state_dtype(optimizer: dict[str, Any]) -> None:
    """Refuse before a queue is waited in what every rank would refuse."""
    if is_ademamix(optimizer) and "state_dtype" in optimizer:
        betas = optimizer.get("betas")
        beta1 = betas[0] if isinstance(betas, Sequence) and betas else 1.0
        checked_state_dtype(optimizer["state_dtype"], beta1=beta1, key="training.optimizer.state_dtype")
