"""The curriculum of an anemoi-training task (its rollout) as a function of the optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


class Curriculum:
    """A task of anemoi-training, told the end of every epoch.

    Parameters
    ----------
    task : anemoi.training.tasks.base.BaseTask
        Its state is changed in place.
    steps_per_epoch : int
        Optimizer steps of an epoch.
    """

    def __init__(self, task: Any, *, steps_per_epoch: int) -> None:
        self.task, self._steps_per_epoch = task, steps_per_epoch
        self._epochs = 0

    def advance(self, step: int) -> None:
        """Bring the task to optimizer step ``step`` (from 0), which never lies before the last one."""
        while self._epochs < step // self._steps_per_epoch:
            self.task.on_train_epoch_end(current_epoch=self._epochs)
            self._epochs += 1

    def copy(self) -> Curriculum:
        """Return a copy that advances by itself: data workers read ahead of the step being trained."""
        return copy.deepcopy(self)

    def longest(self) -> Any:
        """Return a copy of the task with the longest rollout that the curriculum reaches."""
        task = copy.deepcopy(self.task)
        if (rollout := getattr(task, "rollout", None)) is not None:
            rollout.step = max(rollout.step, rollout.maximum)
        return task

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON."""
        return {"epochs": self._epochs, "runtime": self.task.training_runtime_state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`; without it, of an imported checkpoint, begin with epoch 0."""
        if not state:
            return
        self._epochs = state["epochs"]
        self.task.load_training_runtime_state_dict(state["runtime"])
