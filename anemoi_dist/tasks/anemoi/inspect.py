"""Facts about the data of an anemoi-training configuration, for the control side, which imports no torch.

``python -m anemoi_dist.tasks.anemoi.inspect ALLOWED...`` reads ``task.settings`` as YAML from standard input, takes
``security.allowed_targets`` as its arguments, and prints one line of JSON:
``{"num_samples": {"training": n, "validation": m}, "error": null}``.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

import yaml

from anemoi_dist.config.schema import Config, RunConfig, SecurityConfig, TaskConfig
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import AnemoiDistError
from anemoi_dist.tasks.anemoi.build import create_builder
from anemoi_dist.tasks.anemoi.curriculum import Curriculum
from anemoi_dist.tasks.anemoi.samples import AnemoiSamples
from anemoi_dist.tasks.anemoi.weights import StartFile, check_start


def main() -> None:
    """Read the settings, open the data and print what they hold, or what is wrong."""
    settings = yaml.safe_load(sys.stdin)  # not JSON: an imputer's keys are numbers
    with redirect_stdout(sys.stderr):  # the answer alone goes to standard output
        try:
            answer: Tree = {"num_samples": _count(settings, allowed=sys.argv[1:]), "error": None}
        except AnemoiDistError as error:
            answer = {"num_samples": {}, "error": str(error)}
        except Exception as error:
            # Whatever anemoi's libraries say of the user's configuration is the user's to read.
            answer = {"num_samples": {}, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)  # noqa: T201


def _count(settings: Tree, *, allowed: list[str]) -> dict[str, int]:
    start = check_start(settings)
    security = SecurityConfig(allowed_targets=allowed)
    builder = create_builder(
        Config(run=RunConfig(id="inspect", seed=1), task=TaskConfig(settings=settings), security=security)
    )
    if start is not None:
        StartFile(start).check_variables(builder.data_indices, builder.datamodule.metadata, settings)
    curriculum = Curriculum(builder.task, steps_per_epoch=1)
    counts = {"training": len(AnemoiSamples(builder.datamodule.ds_train, curriculum=curriculum, mode="training"))}
    try:
        counts["validation"] = len(AnemoiSamples(builder.datamodule.ds_valid, curriculum=curriculum, mode="validation"))
    except (ValueError, KeyError, OSError, AssertionError):
        counts["validation"] = 0
    return counts


if __name__ == "__main__":
    main()
