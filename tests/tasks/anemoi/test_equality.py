"""The same numbers as anemoi-training's own Trainer, with the same batches and the same noise."""

import pytest
import torch
from support.anemoi import ENSEMBLE, PROCESSED, SMALL_GAPS, compose_small, train_ours, train_theirs

#: Configuration and overrides of anemoi-training.
ROWS = {
    "deterministic": ("config", SMALL_GAPS, "graph.nodes.hidden.node_builder.resolution=1"),
    "ensemble": ("ensemble_crps", *ENSEMBLE),
    "processed": ("config", *PROCESSED),
}


@pytest.mark.parametrize(
    ("row", "num_ranks", "steps"),
    [
        ("processed", 2, 6),
        *(pytest.param(row, num_ranks, 50, marks=pytest.mark.slow) for row in ROWS for num_ranks in (1, 2)),
    ],
)
def test_losses_parameters_and_metrics_are_those_of_their_trainer(ranks, tmp_path, row, num_ranks, steps):
    name, *overrides = ROWS[row]
    batches = steps // 5 if steps > 10 else 2  # theirs validates at the ends of epochs
    overrides += [f"training.max_steps={steps}", f"dataloader.limit_batches.training={batches}"]
    config = compose_small(name, *overrides, root=tmp_path, ranks=num_ranks)
    assert config.task.steps_per_epoch == batches
    ours = ranks(num_ranks).run(train_ours, config)
    theirs = ranks(num_ranks).run(train_theirs, config)
    mean_losses = torch.tensor([rank["losses"] for rank in theirs], dtype=torch.float64).mean(0)
    assert len(mean_losses) == steps
    assert ours[0]["losses"] == pytest.approx(mean_losses.tolist(), rel=1e-6)
    for name, value in ours[0]["metrics"].items():
        key = "val_multi_dataset_loss" if name == "loss" else f"val_{name}"
        assert value == pytest.approx(theirs[0]["metrics"][key], rel=1e-6), name
    for name, parameter in theirs[0]["parameters"].items():
        torch.testing.assert_close(ours[0]["parameters"][name], parameter, rtol=1e-5, atol=1e-6)
