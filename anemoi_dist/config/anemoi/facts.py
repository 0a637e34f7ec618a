"""Facts about the data of an anemoi configuration, from a process of their own: reading them imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import yaml

from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError, PreflightError, print_message

_MODULE = "anemoi_dist.tasks.anemoi.inspect"


@dataclass(frozen=True)
class Facts:
    """Numbers that only the data tell: samples of each split."""

    training: int
    validation: int


def describe(settings: Tree, *, config: str, allowed: Iterable[str] = ()) -> Facts:
    """Open the datasets of a composed configuration and count its samples. It takes about ten seconds.

    Parameters
    ----------
    settings : Tree
        ``task.settings``.
    config : str
        ``task.config``, for errors.
    allowed : Iterable[str]
        ``security.allowed_targets``.

    Raises
    ------
    ConfigError
        anemoi-training refuses the configuration, or its data cannot be read.
    PreflightError
        The process that reads them ended without an answer.
    """
    print_message("note: reading the data of the anemoi configuration")
    command = [sys.executable, "-m", _MODULE, *allowed]
    done = subprocess.run(command, input=yaml.safe_dump(settings), capture_output=True, text=True)
    try:
        # Libraries print, too: the answer is the last line.
        answer = json.loads(done.stdout.splitlines()[-1])
        error, samples = answer["error"], answer["num_samples"]
    except (IndexError, KeyError, TypeError, ValueError):
        said = "\n".join(done.stderr.splitlines()[-20:])
        raise PreflightError(f"{' '.join(command)} ended with code {done.returncode} and no answer:\n{said}") from None
    if error is not None:
        raise ConfigError("task.config", config, f"is refused, or its data cannot be read: {error}")
    return Facts(training=samples["training"], validation=samples["validation"])
