"""Interface between a task (data, model, loss, scores) and the training loop.

A task knows its data, model, loss, optimizer, scores and files. Engines, trainer and checkpoints know none of these:
they move parameters, gradients and states of a :class:`TaskModule`, and pass batches through it without looking inside.
"""

from __future__ import annotations

import difflib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anemoi_dist.checkpoint.shard import ShardSource
from anemoi_dist.config.schema import Config
from anemoi_dist.config.tree import Tree
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers.factory import create_optimizer
from anemoi_dist.optimizers.learning_rate import create_scheduler, scaled_rate
from anemoi_dist.run.directory import RunDirectory


class Batch(Protocol):
    """One micro-batch; its content is known to the task alone."""

    def to(self, device: torch.device) -> Self:
        """Copy to ``device``; asynchronously if the batch is pinned."""


class Samples(Protocol):
    """The samples of one split by index, the same on every rank."""

    def __len__(self) -> int:
        """Count the samples."""

    def read(self, index: int, *, step: int) -> Any:
        """Read one sample for optimizer step ``step``; how much of it is needed may grow with the steps."""


class KeepsBufferTypes(nn.Module):
    """A module whose buffers keep their type whatever becomes of its weights.

    ``module.bfloat16()`` would round a mean pressure of 101 325 Pa to a multiple of 512 Pa.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = [(owner, name, b) for owner in self.modules() for name, b in owner._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for owner, name, original in before:
            buffer = owner._buffers[name]
            assert buffer is not None
            if buffer.dtype != original.dtype:
                owner._buffers[name] = original.to(buffer.device)  # the narrow type has lost the digits already
        return self


class TaskModule(nn.Module, ABC):
    """Model and loss in one module, so that engines can wrap both at once.

    Parameters
    ----------
    config : Config
        The whole configuration; ``training`` and ``security`` are used.
    world_size : int
        Data-parallel ranks (or groups of ranks that share a sample), for ``training.lr.scale_with: world_size``.

    Attributes
    ----------
    compute_dtype : torch.dtype
        Type of the model's input. An engine that casts the model's weights sets this too.
    autocast_dtype : torch.dtype or None
        Type that the model computes in under autocast. For an engine that keeps float32 weights.
    gradient_factors : dict[str, float]
        Name of a parameter -> factor for its gradient, for those whose mean over the ranks is not their gradient.
    """

    #: Whether a copy of the module may be run by itself before an engine has it.
    rehearses = True

    def __init__(self, config: Config, *, world_size: int) -> None:
        super().__init__()
        self.config, self.world_size = config, world_size
        self.allowed_targets = tuple(config.security.allowed_targets)
        # Set by the engine: bf16 weights need bf16 input, while statistics and loss stay in float32.
        self.compute_dtype = torch.float32
        self.autocast_dtype: torch.dtype | None = None
        self.gradient_factors: dict[str, float] = {}

    @abstractmethod
    def forward(self, batch: Any, **evaluation: Any) -> Tensor:
        """Return the loss of a batch, a float32 scalar; with ``evaluation``, the output that the task scores."""

    def configure_optimizers(self) -> dict[str, Any]:
        """Build optimizer and scheduler, in the form that Lightning expects.

        Returns
        -------
        dict[str, Any]
            ``optimizer``, and ``lr_scheduler`` with ``scheduler`` and ``interval: step`` unless
            ``training.scheduler`` is null.
        """
        optimizer = self._create_optimizer_from_config(self.config.training.optimizer)
        if self.config.training.scheduler is None:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._create_scheduler(optimizer), "interval": "step"},
        }

    def _create_optimizer_from_config(self, opt_cfg: Tree) -> Optimizer:
        """Build the optimizer that ``opt_cfg._target_`` names, over the parameters that take a gradient."""
        # Frozen parameters get no optimizer states.
        params = [parameter for parameter in self.parameters() if parameter.requires_grad]
        training = self.config.training
        return create_optimizer(
            opt_cfg,
            params,
            lr=scaled_rate(training.lr, self.world_size),
            allowed=self.allowed_targets,
            max_steps=training.max_steps,
        )

    def _create_scheduler(self, optimizer: Optimizer) -> Any:
        """Build the scheduler that ``training.scheduler._target_`` names."""
        training = self.config.training
        assert training.scheduler is not None
        return create_scheduler(
            training.scheduler, optimizer, lr=training.lr, max_steps=training.max_steps, allowed=self.allowed_targets
        )


#: ``evaluate(batch, **evaluation)`` calls the module's ``forward`` without gradient, in evaluation mode. Collective.
Evaluate = Callable[..., Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes
    ----------
    scores : Sequence[Mapping[str, object]]
        One record a score, as a ``validation`` event holds it.
    table : str
        The same for a reader.
    metrics : Mapping[str, float]
        The scores by name, for TensorBoard and MLflow.
    summary : Mapping[str, float]
        One number for each metric that ``checkpoint.keep_best`` can name.
    """

    scores: Sequence[Mapping[str, object]] = ()
    table: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """Point that a new run begins at, instead of initial weights at step 0.

    Attributes
    ----------
    notes : Sequence[str]
        What to tell the user.
    source : ShardSource, optional
        Weights and optimizer states of another program's run, which this one continues. None: the module has all.
    step : int
        Optimizer steps that are done.
    task : Mapping[str, Any]
        For :meth:`Task.load_state_dict`.
    """

    notes: Sequence[str] = ()
    source: ShardSource | None = None
    step: int = 0
    task: Mapping[str, Any] = field(default_factory=dict)


def freeze(module: TaskModule, patterns: Sequence[str]) -> None:
    """Let the parameters whose names fit a pattern keep their values.

    Raises
    ------
    ConfigError
        A pattern fits no parameter, or nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            near = difflib.get_close_matches(pattern, parameters, n=10, cutoff=0.3)
            raise ConfigError("training.freeze", pattern, "fits no parameter of the model", valid=near)
        for name in names:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("training.freeze", list(patterns), "leaves nothing to train", fix="narrower patterns")


class Task(Protocol):
    """Data, model, loss and scores of one training."""

    def samples(self, split: str) -> Samples:
        """Return the samples of ``train``, ``validation`` or ``test``."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Join samples into one :class:`Batch`; called in the data workers."""

    def warnings(self) -> list[str]:
        """Return warnings about data and settings, to be shown before the first step."""

    def create_module(self, *, world_size: int) -> TaskModule:
        """Build model and loss, the same on every rank that was seeded alike.

        Parameters
        ----------
        world_size : int
            Data-parallel ranks (or groups of ranks that share a sample), for ``training.lr.scale_with``.
        """

    def load_initial(self, module: Any) -> Start:
        """Load weights that a new run begins with into the result of :meth:`create_module`, or return them."""

    def begin_step(self, step: int) -> None:
        """Prepare for optimizer step ``step`` (from 0); called before every step, with ever larger numbers."""

    def evaluate(self, split: str, *, evaluate: Evaluate, world: World) -> Evaluation:
        """Score the model on a split. Collective."""

    def after_save(self, step: int, *, run: RunDirectory, world: World) -> list[str]:
        """Begin to write what belongs to a checkpoint that has just been committed; return messages.

        Called on every rank, at a step boundary, after the retention has deleted what is not kept. It neither
        communicates nor raises, and training does not wait for it: what goes wrong is a message of a later call.
        """

    def export(self, run: RunDirectory, *, evaluate: Evaluate, world: World) -> list[str]:
        """Write what is shown, or used, of a trained model into ``run``; return messages. Collective; rank 0 writes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state other than tensors that checkpoints carry, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
