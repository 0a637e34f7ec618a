"""The typed configuration: what every key means, and its default. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from anemoi_dist.config.engines import ENGINE_KINDS, EngineSpec, find_engine
from anemoi_dist.config.tree import Tree

LAUNCHER_KINDS = ("local", "slurm", "mpi")
#: Scores by which the best checkpoint can be chosen.
SAVE_METRICS = ("rmse", "acc")
#: What an existing run may only change when ``run.allow_changed`` names it, with the keys that each name stands for.
GUARDED = {"model": "model", "data": "data", "seed": "run.seed"}


def bounded(default: Any = MISSING, *, minimum: float) -> Any:
    """Declare a key whose value, unless null, is at least ``minimum``."""
    return field(default=default, metadata={"minimum": minimum})


def positive(default: Any = MISSING, *, fix: str, rule: str = "must be positive") -> Any:
    """Declare a key whose value, unless null, is positive and finite; an error says ``rule`` and ``fix``."""
    return field(default=default, metadata={"positive": rule, "fix": fix})


def one_of(default: Any = MISSING, *, valid: Sequence[Any], rule: str = "is not a valid name") -> Any:
    """Declare a key whose value, unless null, is one of ``valid``; an error says ``rule``."""
    return field(default=default, metadata={"valid": valid, "rule": rule})


@dataclass
class RunConfig:
    """Which run this is. ``id`` null: derived from the configuration, so that the same command continues it."""

    root: str = "runs"
    id: str | None = None
    seed: int = bounded(0, minimum=0)
    #: ``model``, ``data``, ``seed``: may differ from what this run was started with.
    allow_changed: list[str] = field(default_factory=list)


@dataclass
class LrConfig:
    """Learning rate: a function of this block and the optimizer step, nothing else."""

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
class TrainingConfig:
    """What is optimized and for how long."""

    max_steps: int = bounded(minimum=1)
    global_batch_size: int = bounded(minimum=1)
    #: Samples that one rank holds in one forward pass; null: all of its share of the global batch.
    micro_batch_size: int | None = None
    #: Forecast steps that the loss rolls out.
    rollout: int = bounded(1, minimum=1)
    lr: LrConfig = field(default_factory=LrConfig)
    #: ``_target_`` and its arguments; ``params`` and ``lr`` are injected.
    optimizer: Tree = MISSING
    #: ``_target_`` and its arguments; null: a constant rate.
    scheduler: Tree | None = None
    #: Largest global L2 norm of the gradient; null: no clipping.
    clip_grad_norm: float | None = positive(None, fix="null switches clipping off")
    precision: str = one_of("fp32", valid=("fp32", "bf16"))
    #: Updates in a row that may be skipped for a loss or gradient that is not finite, before the run ends (code 5).
    max_skipped: int = bounded(10, minimum=0)


@dataclass
class EngineConfig:
    """How parameters, gradients and optimizer states are spread over ranks."""

    kind: str = one_of(valid=ENGINE_KINDS)
    #: ZeRO stage, for ``kind: deepspeed``.
    stage: int = one_of(0, valid=(0, 1, 2, 3), rule="must be a ZeRO stage")
    #: Keep the optimizer's states and its step on the CPU (ZeRO 3).
    offload: bool = False
    #: Gather the working parameters of what has been stepped while the rest is stepped (ZeRO 1 and 2, FSDP2).
    overlap: bool = False
    #: Further keys of DeepSpeed's own configuration, merged over ours.
    options: Tree = field(default_factory=dict)

    @property
    def spec(self) -> EngineSpec:
        """The engine's entry in the table of engines."""
        return find_engine(self.kind, stage=self.stage, offload=self.offload)


@dataclass
class SplitConfig:
    """First and last date (inclusive) of one block of the dataset; null: as far as it goes."""

    start: str | None = None
    end: str | None = None


@dataclass
class DataConfig:
    """What is read. ``dataset`` takes whatever ``anemoi.datasets.open_dataset`` takes."""

    kind: str = one_of(valid=("anemoi", "synthetic"))
    #: Path, name, list or dictionary for ``open_dataset``; for ``kind: synthetic`` its shape.
    dataset: Any = None
    #: Further options of ``open_dataset`` (``select``, ``frequency``, ``missing_dates``, ...).
    options: Tree = field(default_factory=dict)
    train: SplitConfig = field(default_factory=SplitConfig)
    validation: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)
    #: Variables that are given, not forecast (sun, orography, ...).
    forcing: list[str] = field(default_factory=list)
    #: Past states that the model sees.
    multistep_input: int = bounded(2, minimum=1)
    num_workers: int = bounded(1, minimum=0)
    #: Batches that each worker reads ahead.
    prefetch_factor: int = bounded(2, minimum=1)


@dataclass
class ValidationConfig:
    """When and on what the forecast is scored."""

    #: Optimizer steps between validations; null: only at the end.
    interval_steps: int | None = bounded(None, minimum=1)
    #: Forecast steps to score, 1 is the first.
    lead_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    #: Samples scored at most, evenly spaced; null: all.
    max_samples: int | None = bounded(None, minimum=1)


@dataclass
class CheckpointConfig:
    """When the run is saved and what is kept. The end of a run is always saved."""

    #: Optimizer steps between checkpoints; null: none but those of ``interval_minutes`` and the end.
    interval_steps: int | None = bounded(None, minimum=1)
    #: Minutes between checkpoints, by the clock of rank 0; null: only ``interval_steps`` counts.
    interval_minutes: float | None = positive(None, fix="null: by steps alone")
    #: Newest checkpoints to keep; null: all.
    keep_last: int | None = bounded(3, minimum=1)
    #: Keep, for ever, the checkpoints whose step is a multiple of this.
    keep_every: int | None = bounded(None, minimum=1)
    #: Keep the best by ``rmse`` or ``acc`` on the validation block; null: none for that.
    keep_best: str | None = one_of(None, valid=SAVE_METRICS)
    #: Write in a thread while training goes on, from a copy in host memory.
    asynchronous: bool = True
    #: What a checkpoint does that is due while one is being written: ``wait`` for it, or ``skip``.
    when_busy: str = one_of("wait", valid=("wait", "skip"))
    #: What a checkpoint that could not be written does: ``warn`` and train on, or ``stop`` the run (code 4).
    on_error: str = one_of("warn", valid=("warn", "stop"))
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
    interval_steps: int = bounded(10, minimum=1)
    tensorboard: bool = False


@dataclass
class SlurmConfig:
    """What a SLURM cluster wants to know of a job. Null and empty: the cluster's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    #: Any other ``#SBATCH`` option by its long name, without dashes: ``{mem: 64G, exclusive: true}``.
    options: Tree = field(default_factory=dict)
    #: Modules to load in the job.
    modules: list[str] = field(default_factory=list)
    #: Shell lines of the batch script that run before anything of ours.
    setup: list[str] = field(default_factory=list)
    #: Network interface that NCCL and gloo use between nodes.
    interface: str | None = None
    #: Seconds before the time limit at which the run is asked to save; SLURM may be 60 s early.
    signal_s: int = bounded(300, minimum=1)


@dataclass
class LauncherConfig:
    """Where ranks run, and how often they are started again."""

    kind: str = one_of("local", valid=LAUNCHER_KINDS)
    nodes: int = bounded(1, minimum=1)
    #: Ranks on each node; null: one a GPU, or 2 where there is none.
    ranks: int | None = bounded(None, minimum=1)
    #: GPUs that each node gives to the job; null: those of this machine, or none.
    gpus_per_node: int | None = bounded(None, minimum=0)
    #: Time limit of one job (``HH:MM:SS`` or ``D-HH:MM:SS``); null: the queue's.
    time: str | None = None
    #: Times that the ranks are started again after a crash or a hang, without leaving the machine or the allocation.
    max_restarts: int = bounded(0, minimum=0)
    #: Seconds before the first of these restarts; each further one waits twice as long, 60 s at most.
    backoff_s: float = bounded(1.0, minimum=0)
    #: Times that a job goes back into the queue after a time limit or a preemption.
    max_requeues: int = bounded(100, minimum=0)
    #: Times that a job goes back into the queue after a crash, as long as each life made progress.
    max_retries: int = bounded(3, minimum=0)
    #: Ranks look at each other before they train (versions, clocks, disk, collectives), as ``anemoi-dist doctor`` does.
    preflight: bool = False
    #: What starts the ranks of a node in a SLURM job: one ``torchrun``, or one ``srun`` task a rank.
    ranks_by: str = one_of("torchrun", valid=("torchrun", "srun"))
    #: File with one host a line, for mpirun; null: this machine, or the hosts of the job it is started in.
    hostfile: str | None = None
    #: Name of a file in ``slurm/profiles``, or a path: the cluster's values for this group.
    profile: str | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class WatchdogConfig:
    """What counts as a hang."""

    #: Seconds without a sign of life from a rank until its stacks are dumped and the run ends with code 6; null: never.
    timeout_s: float | None = positive(1800.0, fix="null switches the watchdog off")


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
    model: Tree = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)


#: Nodes whose keys belong to somebody else: a model's or an optimizer's arguments, open_dataset's options.
FREE_FORM = (
    "model.",
    "training.optimizer.",
    "training.scheduler.",
    "engine.options.",
    "data.options.",
    "data.dataset.",
    "launcher.slurm.options.",
)
