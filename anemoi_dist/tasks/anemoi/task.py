"""Task of an anemoi-training configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from anemoi_dist.checkpoint.store import open_store
from anemoi_dist.config.schema import Config
from anemoi_dist.config.tree import Tree
from anemoi_dist.data.fields import evenly_spaced
from anemoi_dist.distributed.world import World
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.anemoi.build import create_builder
from anemoi_dist.tasks.anemoi.curriculum import Curriculum
from anemoi_dist.tasks.anemoi.groups import divide_reading, join_groups
from anemoi_dist.tasks.anemoi.kept import KeptFiles, write_inference
from anemoi_dist.tasks.anemoi.module import AnemoiModule
from anemoi_dist.tasks.anemoi.samples import AnemoiBatch, AnemoiSamples, collate
from anemoi_dist.tasks.anemoi.weights import check_frozen, load_start
from anemoi_dist.tasks.base import Evaluate, Evaluation, Start
from anemoi_dist.telemetry.heartbeat import beat

_SPLITS = {"train": ("ds_train", "training"), "validation": ("ds_valid", "validation"), "test": ("ds_test", "test")}


class AnemoiTask:
    """The task that anemoi-training builds from ``task.settings``; see :class:`anemoi_dist.tasks.base.Task`.

    Parameters
    ----------
    config : Config
        ``task``, ``training``, ``validation`` and ``run.seed`` are used.

    Raises
    ------
    PreflightError
        Anemoi-training cannot be imported.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._builder = create_builder(config)
        steps_per_epoch = config.task.steps_per_epoch
        assert steps_per_epoch is not None, "composition fills it in"
        self._curriculum = Curriculum(self._builder.task, steps_per_epoch=steps_per_epoch)
        self._module: AnemoiModule | None = None
        self._kept: KeptFiles | None = None

    def samples(self, split: str) -> AnemoiSamples:
        """Return the samples of a split, read by a curriculum of their own that starts where training stands."""
        attribute, mode = _SPLITS[split]
        dataset = getattr(self._builder.datamodule, attribute)
        divide_reading(dataset, self._config.task.groups)
        return AnemoiSamples(dataset, curriculum=self._curriculum.copy(), mode=mode)

    def collate(self, samples: Sequence[AnemoiBatch]) -> AnemoiBatch:
        """Stack samples along a new first axis."""
        return collate(samples)

    def warnings(self) -> list[str]:
        """Name the splits that cannot be scored."""
        return [f"warning: the {split} split is not scored: {reason}" for split, reason in self._unscored.items()]

    def create_module(self, *, world_size: int) -> AnemoiModule:
        """Let anemoi-training build model, processors, losses and scalers."""
        from anemoi.training.utils.compile import prepare_compilation

        check_frozen(self._builder.model, self._config.task.settings)
        settings: Any = self._builder.config
        method = prepare_compilation(self._builder.model, settings.model, settings.training)
        groups = self._config.task.groups
        if groups.sample > 1 and dist.is_initialized():  # else only the sizes of its parameters are asked for
            join_groups(method, groups)
        self._module = AnemoiModule(method, self._config, world_size=world_size)
        return self._module

    def load_initial(self, module: AnemoiModule) -> Start:
        """Load the weights of ``system.input.warm_start``, or return where its run has left off."""
        metadata, steps_per_epoch = self._builder.datamodule.metadata, self._config.task.steps_per_epoch
        assert steps_per_epoch is not None, "composition fills it in"
        return load_start(module.method, self._config.task.settings, metadata=metadata, steps_per_epoch=steps_per_epoch)

    def begin_step(self, step: int) -> None:
        """Advance the rollout at the ends of epochs."""
        self._curriculum.advance(step)

    def evaluate(self, split: str, *, evaluate: Evaluate, world: World) -> Evaluation:
        """Return the means of loss and metrics over the samples of a split. Collective."""
        if split in self._unscored:
            return Evaluation(table=f"not scored: {self._unscored[split]}")
        samples, groups = self.samples(split), self._config.task.groups
        size = int(self._config.task.settings["dataloader"]["batch_size"][_SPLITS[split][1]])
        size = size if groups.model == 1 else 1  # a shared model takes one sample at a time
        scored = evenly_spaced(len(samples), at_most=self._config.validation.max_samples)
        num_shares = world.world_size // groups.sample
        sums = torch.zeros(())
        for batch in range(-(-len(scored) // (size * num_shares))):
            beat()  # the watchdog must see progress between calls
            mine = scored[world.rank // groups.sample :: num_shares][batch * size :][:size]
            # The forward pass is collective: a rank without samples left repeats one, which does not count.
            read = [samples.read(int(index), step=0) for index in (mine if len(mine) else scored[:1])]
            values = evaluate(collate(read).to(world.device), validation=True)
            sums = sums + values.detach().double().cpu() * len(mine)
        dist.all_reduce(sums, group=world.control_group)
        sums /= groups.sample  # every rank of a group has scored the group's samples
        assert self._module is not None, "a module has been evaluated"
        means = dict(zip(self._module.score_names, (sums / len(scored)).tolist(), strict=True))
        return Evaluation(
            scores=[{"name": name, "value": value} for name, value in means.items()],
            table="\n".join(f"{name:<{max(map(len, means))}}  {value:.6g}" for name, value in means.items()),
            metrics=means,
            summary={"loss": means["loss"]} if math.isfinite(means["loss"]) else {},
        )

    def after_save(self, step: int, *, run: RunDirectory, world: World) -> list[str]:
        """Begin to write the checkpoint's inference file, with ``task.inference=checkpoints``."""
        if not (world.is_main and self._config.task.inference == "checkpoints"):
            return []
        kept = self._kept_files(run)
        kept.update(saved=step)
        return kept.messages()

    def export(self, run: RunDirectory, *, evaluate: Evaluate, world: World) -> list[str]:
        """Write the last checkpoint for anemoi-inference, into the run. Rank 0 writes."""
        if not world.is_main or self._config.task.inference == "none":
            return []
        messages: list[str] = []
        if self._config.task.inference == "checkpoints":
            kept = self._kept_files(run)
            kept.update()
            kept.wait()
            messages = kept.messages()
        beat()
        try:
            last = open_store(run, self._config.checkpoint.url).steps()[0]
            write_inference(run, last, run.inference_file, config=self._config)
        except Exception as error:  # a full disk, say: what was trained is saved, and can be exported later
            messages.append(f"warning: {run.inference_file} was not written: {error}")
        return messages

    def _kept_files(self, run: RunDirectory) -> KeptFiles:
        if self._kept is None:
            self._kept = KeptFiles(run, self._config)
        return self._kept

    def state_dict(self) -> Tree:
        """Return the epochs done and the task's own runtime state (rollout)."""
        return self._curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self._curriculum.load_state_dict(state)

    @cached_property
    def _unscored(self) -> dict[str, str]:
        """Splits that cannot be opened, with the reason: training works without them, as in anemoi-training."""
        reasons = {}
        for split in ("validation", "test"):
            try:
                self.samples(split)
            except (ValueError, KeyError, OSError, AssertionError) as error:
                reasons[split] = str(error) or type(error).__name__
        return reasons
