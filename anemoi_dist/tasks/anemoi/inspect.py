"""Facts about the data of an anemoi-training configuration, for the control side, which imports no torch.

``python -m anemoi_dist.tasks.anemoi.inspect`` reads ``task.settings`` as JSON from standard input and prints one line:
``{"num_samples": {"training": n, "validation": m}, "error": null}``.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

from anemoi_dist.config.schema import Config, RunConfig, TaskConfig
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import AnemoiDistError
from anemoi_dist.tasks.anemoi.build import create_builder
from anemoi_dist.tasks.anemoi.curriculum import Curriculum
from anemoi_dist.tasks.anemoi.samples import AnemoiSamples


def main() -> None:
    """Read the settings, open the data and print what they hold, or what is wrong."""
    settings = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):  # the answer alone goes to standard output
        try:
            answer: Tree = {"num_samples": _count(settings), "error": None}
        except AnemoiDistError as error:
            answer = {"num_samples": {}, "error": str(error)}
        except Exception as error:
            # Whatever anemoi's libraries say of the user's configuration is the user's to read.
            answer = {"num_samples": {}, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)  # noqa: T201


def _count(settings: Tree) -> dict[str, int]:
    builder = create_builder(Config(run=RunConfig(id="inspect", seed=1), task=TaskConfig(settings=settings)))
    curriculum = Curriculum(builder.task, steps_per_epoch=1)
    counts = {"training": len(AnemoiSamples(builder.datamodule.ds_train, curriculum=curriculum, mode="training"))}
    try:
        counts["validation"] = len(AnemoiSamples(builder.datamodule.ds_valid, curriculum=curriculum, mode="validation"))
    except (ValueError, KeyError, OSError, AssertionError):
        counts["validation"] = 0
    return counts


if __name__ == "__main__":
    main()
