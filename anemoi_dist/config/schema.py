"""The typed configuration: meaning, default and bounds of every key. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from anemoi_dist.config.engines import ENGINE_KINDS, EngineSpec, find_engine
from anemoi_dist.config.groups import GroupSizes, group_sizes
from anemoi_dist.config.tree import Tree

TASK_KINDS = ("forecast", "anemoi")
INFERENCE_FILES = ("none", "end", "checkpoints")
LAUNCHER_KINDS = ("local", "slurm", "mpi")
#: Scores of each task by which the best checkpoint can be chosen.
SAVE_METRICS = {"forecast": ("rmse", "acc"), "anemoi": ("loss",)}
#: What an existing run may only change when ``run.allow_changed`` names it, with the keys that each name stands for.
GUARDED = {"model": "model", "data": "data", "seed": "run.seed", "task": "task"}

#: Metadata of a key that version 0.1.0 did not have; while it has its default, it is no part of a run's identity.
ADDED = {"added": True}


def bounded(default: Any = MISSING, *, minimum: float) -> Any:
    """Declare a key whose value, unless null, is at least ``minimum``."""
    return field(default=default, metadata={"minimum": minimum})


def positive(default: Any = MISSING, *, fix: str, rule: str = "must be positive", added: bool = False) -> Any:
    """Declare a key whose value, unless null, is positive and finite; an error says ``rule`` and ``fix``."""
    return field(default=default, metadata={"positive": rule, "fix": fix, "added": added})


def one_of(default: Any = MISSING, *, valid: Sequence[Any], rule: str = "is not a valid name") -> Any:
    """Declare a key whose value, unless null, is one of ``valid``; an error says ``rule``."""
    return field(default=default, metadata={"valid": valid, "rule": rule})


def added_defaults() -> Tree:
    """Return dotted key and default of every key that has :data:`ADDED` in its metadata, and of those below it."""
    return dict(_added_leaves(Config(), "", below=False))


def _added_leaves(node: Any, prefix: str, *, below: bool) -> Iterator[tuple[str, Any]]:
    for item in fields(node):
        value, is_added = getattr(node, item.name), below or item.metadata.get("added", False)
        if is_dataclass(value):
            yield from _added_leaves(value, f"{prefix}{item.name}.", below=is_added)
        elif is_added:
            yield f"{prefix}{item.name}", value


@dataclass
class RunConfig:
    """Identity of the run. ``id`` null: derived from the configuration, so that the same command continues the run."""

    #: Directory of all runs; on several nodes one that they share.
    root: str = "runs"
    #: Name of the run and of its directory.
    id: str | None = None
    #: Decides the initial parameters, the order of the samples and every random draw.
    seed: int = bounded(0, minimum=0)
    #: ``model``, ``data``, ``seed``: may differ from what this run was started with.
    allow_changed: list[str] = field(default_factory=list)


@dataclass
class LrConfig:
    """Learning rate: a function of this group and of the optimizer step, nothing else."""

    #: Rate after the warm-up.
    rate: float = positive(1e-3, rule="must be a positive, finite number", fix="training.lr.rate=1e-3")
    #: Optimizer steps of the cosine; null: ``training.max_steps``.
    iterations: int | None = bounded(None, minimum=1)
    #: Rate at the end of the cosine.
    min: float = 0.0
    #: Optimizer steps of linear warm-up.
    warmup: int = bounded(0, minimum=0)
    #: ``world_size`` multiplies ``rate`` (not ``min``) by the number of data-parallel ranks, as anemoi-training does.
    scale_with: str = one_of("none", valid=("none", "world_size"))


@dataclass
class WeightAveragingConfig:
    """Exponential moving average (EMA) of the weights, which is scored in the place of the weights themselves."""

    #: What the average keeps of itself at every optimizer step, such as 0.999; null: no average.
    decay: float | None = None


@dataclass
class TrainingConfig:
    """Optimization: its length, batch, rate and optimizer."""

    #: Optimizer steps of the whole run.
    max_steps: int = bounded(minimum=1)
    #: Samples of one optimizer step, over all ranks.
    global_batch_size: int = bounded(minimum=1)
    #: Samples in one forward pass of one rank; null: all of the rank's share of the global batch.
    micro_batch_size: int | None = None
    #: Forecast steps of the loss.
    rollout: int = bounded(1, minimum=1)
    lr: LrConfig = field(default_factory=LrConfig)
    #: ``_target_`` and its arguments; ``params`` and ``lr`` are injected.
    optimizer: Tree = MISSING
    #: ``_target_`` and its arguments; null: a constant rate.
    scheduler: Tree | None = None
    #: Largest global L2 norm of the gradient; null: no clipping.
    clip_grad_norm: float | None = positive(None, fix="null switches clipping off")
    #: Largest absolute value of an element of the gradient, instead of ``clip_grad_norm``; null: no clipping.
    clip_grad_value: float | None = positive(None, fix="null switches clipping off", added=True)
    weight_averaging: WeightAveragingConfig = field(default_factory=WeightAveragingConfig, metadata=ADDED)
    #: Patterns of parameters that keep their values (``model.encoder.*``).
    freeze: list[str] = field(default_factory=list, metadata=ADDED)
    precision: str = one_of("fp32", valid=("fp32", "bf16"))
    #: Consecutive updates that may be skipped because loss or gradient is not finite; one more ends the run (code 5).
    max_skipped: int = bounded(10, minimum=0)


@dataclass
class EngineConfig:
    """Partitioning of parameters, gradients and optimizer states over the ranks."""

    kind: str = one_of(valid=ENGINE_KINDS)
    #: ZeRO stage, for ``kind: deepspeed``.
    stage: int = one_of(0, valid=(0, 1, 2, 3), rule="must be a ZeRO stage")
    #: Keep the optimizer states and run the optimizer step on the CPU (ZeRO 3).
    offload: bool = False
    #: Gather updated parameters while the others are still being updated (ZeRO 1 and 2, FSDP2).
    overlap: bool = False
    #: Further keys of DeepSpeed's own configuration, merged over ours.
    options: Tree = field(default_factory=dict)

    @property
    def spec(self) -> EngineSpec:
        """The engine's entry in the table of engines."""
        return find_engine(self.kind, stage=self.stage, offload=self.offload)


@dataclass
class TaskConfig:
    """The task: what is trained on what, and how it is scored."""

    #: ``forecast`` is built from ``data`` and ``model``; ``anemoi`` from a configuration of anemoi-training.
    kind: str = one_of("forecast", valid=TASK_KINDS)
    #: Configuration of anemoi-training: a composed YAML file, or a directory with ``defaults`` to compose.
    config: str | None = None
    #: Name of the top-level file in that directory, without ``.yaml``.
    name: str = "config"
    #: Overrides of anemoi-training's configuration, in Hydra's grammar.
    overrides: list[str] = field(default_factory=list)
    #: The result: anemoi-training's whole configuration, composed and resolved. Filled in, and frozen with the run.
    settings: Tree = field(default_factory=dict)
    #: Keys of this configuration, with dots, that those settings set where the user has not. Filled in.
    translated: Tree = field(default_factory=dict)
    #: With ``anemoi``, files that anemoi-inference loads: ``end``, ``inference.ckpt`` at the end of the run;
    #: ``checkpoints``, also ``inference/step-N.ckpt`` of each checkpoint that is kept.
    inference: str = one_of("end", valid=INFERENCE_FILES, rule="does not say which inference files to write")
    #: Optimizer steps of an epoch, which validation, checkpoints and the rollout curriculum count by. Filled in.
    steps_per_epoch: int | None = bounded(None, minimum=1)

    @property
    def groups(self) -> GroupSizes:
        """Sizes of the groups of ranks that share a model or a sample."""
        return group_sizes(self.settings)


@dataclass
class SplitConfig:
    """First and last date (inclusive) of a split; null: the first or the last of the dataset."""

    start: str | None = None
    end: str | None = None


@dataclass
class DataConfig:
    """Dataset, its splits and its loader. ``dataset`` takes whatever ``anemoi.datasets.open_dataset`` takes."""

    kind: str = one_of(valid=("anemoi", "synthetic"))
    #: Path, name, list or dictionary for ``open_dataset``; for ``kind: synthetic`` its shape.
    dataset: Any = None
    #: Further options of ``open_dataset`` (``select``, ``frequency``, ``missing_dates``, ...).
    options: Tree = field(default_factory=dict)
    train: SplitConfig = field(default_factory=SplitConfig)
    validation: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)
    #: Variables that are inputs only, not forecast (insolation, orography, ...).
    forcing: list[str] = field(default_factory=list)
    #: Past states that are the input of the model.
    multistep_input: int = bounded(2, minimum=1)
    #: Processes of each rank that read; 0: the rank reads by itself.
    num_workers: int = bounded(1, minimum=0)
    #: Batches that each worker reads ahead.
    prefetch_factor: int = bounded(2, minimum=1)


@dataclass
class ValidationConfig:
    """Validation of the forecast: interval, lead times and samples."""

    #: Optimizer steps between validations; null: only at the end.
    interval_steps: int | None = bounded(None, minimum=1)
    #: Forecast steps to score, 1 is the first.
    lead_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    #: Samples scored at most, evenly spaced; null: all.
    max_samples: int | None = bounded(None, minimum=1)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept. The end of a run is always saved."""

    #: Optimizer steps between checkpoints; null: only ``interval_minutes`` and the end of the run cause one.
    interval_steps: int | None = bounded(None, minimum=1)
    #: Minutes between checkpoints, by the clock of rank 0; null: only ``interval_steps`` counts.
    interval_minutes: float | None = positive(None, fix="null: by steps alone")
    #: Newest checkpoints to keep; null: all.
    keep_last: int | None = bounded(3, minimum=1)
    #: Never delete the checkpoints whose step is a multiple of this.
    keep_every: int | None = bounded(None, minimum=1)
    #: Keep the best checkpoint by ``rmse`` or ``acc`` on the validation split, by ``loss`` with ``task=anemoi``; null:
    #: none.
    keep_best: str | None = None
    #: Write in a thread, from a copy in host memory, while training continues.
    asynchronous: bool = True
    #: If a checkpoint is due while another is being written: ``wait`` for that one, or ``skip`` the new one.
    when_busy: str = one_of("wait", valid=("wait", "skip"))
    #: If a checkpoint cannot be written: ``warn`` and train on, or ``stop`` the run (code 4).
    on_error: str = one_of("warn", valid=("warn", "stop"))
    #: Read every file back and verify it before the checkpoint is committed.
    read_back: bool = True
    #: Location of checkpoints for fsspec (``s3://bucket/runs``), with one prefix a run; null: the run directory.
    url: str | None = None
    #: Refuse to resume if the newest checkpoint is damaged, instead of taking the one before.
    strict: bool = False
    #: Weights that a new run begins with: ``RUN``, ``RUN@STEP`` or the directory of a checkpoint; null: random ones.
    init_from: str | None = field(default=None, metadata=ADDED)
    #: Take the optimizer's states of ``init_from``, too.
    init_optimizer: bool = field(default=False, metadata=ADDED)
    #: Old name, or prefix before a dot, of parameters and buffers in the checkpoint -> name in the model.
    rename: dict[str, str] = field(default_factory=dict)
    #: Patterns of parameters and buffers that may be in the model or the checkpoint only, or have changed their shape.
    allow_missing: list[str] = field(default_factory=list)


@dataclass
class MlflowConfig:
    """MLflow, which gets metrics, configuration and report. It authenticates by its own environment variables alone."""

    #: URL of a server or of a database, or a folder; null: MLflow is not used.
    tracking_uri: str | None = None
    #: Name of the experiment, which is created if there is none.
    experiment: str = "anemoi-dist"
    #: Name of the MLflow run; null: ``run.id``.
    run_name: str | None = None


@dataclass
class TelemetryConfig:
    """Progress lines, events and metrics."""

    #: Optimizer steps between lines, events and metrics.
    interval_steps: int = bounded(10, minimum=1)
    #: Write the curves for TensorBoard too.
    tensorboard: bool = False
    mlflow: MlflowConfig = field(default_factory=MlflowConfig, metadata=ADDED)


@dataclass
class SlurmConfig:
    """Options of SLURM jobs. Null and empty: the cluster's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    #: Any other ``#SBATCH`` option by its long name, without dashes: ``{mem: 64G, exclusive: true}``.
    options: Tree = field(default_factory=dict)
    #: Modules to load in the job.
    modules: list[str] = field(default_factory=list)
    #: Shell lines that the batch script runs first.
    setup: list[str] = field(default_factory=list)
    #: Network interface that NCCL and gloo use between nodes.
    interface: str | None = None
    #: Seconds before the time limit at which the run is asked to save; SLURM may be 60 s early.
    signal_s: int = bounded(300, minimum=1)


@dataclass
class LauncherConfig:
    """Number and place of the ranks, and how often they are started again."""

    kind: str = one_of("local", valid=LAUNCHER_KINDS)
    nodes: int = bounded(1, minimum=1)
    #: Ranks on each node; null: one a GPU, or 2 if there is none.
    ranks: int | None = bounded(None, minimum=1)
    #: GPUs that each node gives to the job; null: those of this machine, or none.
    gpus_per_node: int | None = bounded(None, minimum=0)
    #: Time limit of one job (``HH:MM:SS`` or ``D-HH:MM:SS``); null: the queue's.
    time: str | None = None
    #: Restarts of the ranks after a crash or a hang, within the same allocation.
    max_restarts: int = bounded(0, minimum=0)
    #: Seconds before the first restart; each further restart waits twice as long, 60 s at most. A checkpoint in between
    #: makes the next restart a first one.
    backoff_s: float = bounded(1.0, minimum=0)
    #: Requeues of a job after its time limit or a preemption.
    max_requeues: int = bounded(100, minimum=0)
    #: Requeues of a job after a crash, as long as each start has made progress.
    max_retries: int = bounded(3, minimum=0)
    #: Compare the ranks before training (versions, clocks, disk, collectives), as ``anemoi-dist doctor`` does.
    preflight: bool = False
    #: In a SLURM job, ranks are started by one ``torchrun`` a node, or by one ``srun`` task a rank.
    ranks_by: str = one_of("torchrun", valid=("torchrun", "srun"))
    #: File with one host a line, for mpirun; null: this machine, or the hosts of the job it is started in.
    hostfile: str | None = None
    #: Name of a file in ``slurm/profiles``, or a path: the cluster's values for this group.
    profile: str | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class WatchdogConfig:
    """Detection of hangs."""

    #: Seconds without a heartbeat from a rank until its stacks are dumped and the run ends with code 6; null: never.
    timeout_s: float | None = positive(1800.0, fix="null switches the watchdog off")
    #: The same for a rank that starts, until its first step: it imports, opens data, builds and loads; null: 1800, or
    #: ``timeout_s`` where that is longer.
    startup_timeout_s: float | None = positive(None, fix="null: 1800, or watchdog.timeout_s", added=True)

    @property
    def longest_s(self) -> float | None:
        """The longer of the two limits; None if the watchdog is off."""
        return None if self.timeout_s is None else max(self.timeout_s, self.startup_s)

    @property
    def startup_s(self) -> float:
        """The limit of a rank that starts."""
        return max(1800.0, self.timeout_s or 0.0) if self.startup_timeout_s is None else self.startup_timeout_s


@dataclass
class SecurityConfig:
    """Import prefixes that ``_target_`` may name, in addition to the built-in ones."""

    allowed_targets: list[str] = field(default_factory=list)


@dataclass
class Config:
    """The whole configuration of a run, as frozen in ``config.yaml``."""

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig, metadata=ADDED)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    #: ``_target_`` and its arguments.
    model: Tree = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)


#: Nodes whose keys belong to somebody else: a model's or an optimizer's arguments, open_dataset's options.
FREE_FORM = (
    "task.settings.",
    "task.translated.",
    "model.",
    "training.optimizer.",
    "training.scheduler.",
    "engine.options.",
    "data.options.",
    "data.dataset.",
    "launcher.slurm.options.",
)
