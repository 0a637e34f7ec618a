"""Let a Lightning ``Trainer`` drive a :class:`~anemoi_dist.tasks.forecast.module.BaseGraphModule`.

Lightning is no dependency: it is imported when :func:`as_lightning` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from anemoi_dist.data.batch import Batch
from anemoi_dist.optimizers.learning_rate import set_num_updates
from anemoi_dist.tasks.forecast.module import BaseGraphModule

if TYPE_CHECKING:
    from lightning import LightningModule


def as_lightning(module: BaseGraphModule) -> LightningModule:
    """Wrap a module for ``lightning.Trainer.fit``.

    The optimizer, the scheduler and its ``interval`` are what ``module.configure_optimizers()`` returns. Clip the
    gradient and accumulate batches with the Trainer's own options.

    Parameters
    ----------
    module : BaseGraphModule
        Stays usable on its own; its parameters are shared, not copied.

    Returns
    -------
    lightning.LightningModule
        With ``training_step`` and ``validation_step`` over :class:`~anemoi_dist.data.batch.Batch`.
    """
    # Imported here: Lightning is optional and takes seconds.
    from lightning import LightningModule

    class LightningBaseGraphModule(LightningModule):
        """``BaseGraphModule`` under the names that Lightning calls."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            """Return the loss of one batch."""
            loss = self._loss(batch)
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            """Log the loss of one batch."""
            self.log("val_loss", self._loss(batch), sync_dist=True)

        def configure_optimizers(self) -> Any:
            """Return what the module configures."""
            return self.module.configure_optimizers()

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            """Set the rate of the next update; timm's schedulers do nothing in a plain ``step()``."""
            # A function of the step alone, so that a resumed run has the rate of an uninterrupted one.
            set_num_updates(scheduler, self.trainer.global_step)

        def _loss(self, batch: Batch) -> Tensor:
            return self.module(Batch(*batch))

    return LightningBaseGraphModule()
