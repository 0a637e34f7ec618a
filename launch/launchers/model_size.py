"""The size of a configuration's model, from ``anemoi_dist.preflight.model_size`` in another process. No torch here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from time import monotonic

from anemoi_dist.config.parse import to_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.engines.memory_estimate import ModelSize, Parameter
from anemoi_dist.errors import ConfigError, ExitCode

TIMEOUT_S = 120.0


class UnknownSizeError(Exception):
    """The model could not be built here; the message says why."""


def model_size(config: Config, *, timeout_s: float = TIMEOUT_S) -> ModelSize:
    """Build the model in another process and return its size.

    Parameters
    ----------
    config : Config
        Whose model.
    timeout_s : float
        How long that process may take, imports and dataset included.

    Raises
    ------
    ConfigError
        No machine can build it: every rank would refuse it.
    UnknownSizeError
        It has failed here, or taken longer.
    """
    # A login node's GPU, if it has one, is not the job's: opening it takes seconds, and others use it.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "anemoi_dist.preflight.model_size"],
            input=to_yaml(config),
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise UnknownSizeError(f"building the model took more than {timeout_s:g} s") from error
    # Without an answer on stdout the code is an import's or a library's own, and says nothing about the model.
    if done.returncode == ExitCode.CONFIGURATION and done.stdout:
        raise ConfigError(**json.loads(done.stdout)["refused"])
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise UnknownSizeError(said[-1])  # a library's warnings stand before it
    found = json.loads(done.stdout)
    return ModelSize(
        parameters=[Parameter(tuple(each["shape"]), each["trained"]) for each in found["parameters"]],
        buffer_bytes=found["buffer_bytes"],
        largest_layer=tuple(found["largest_layer"]),
    )


def check_models(configs: Sequence[Config], *, timeout_s: float = TIMEOUT_S) -> str:
    """Build the model of each configuration and return why that was not possible here, empty if it was.

    Parameters
    ----------
    configs : Sequence[Config]
        Those with the same model and data share one build.
    timeout_s : float
        For all of them.

    Raises
    ------
    ConfigError
        One of the models cannot be built.
    """
    # Runs of a sweep mostly differ in settings that leave the model alone.
    different = {repr((c.model, c.data, c.training.rollout, c.security)): c for c in configs}
    deadline = monotonic() + timeout_s
    for number, config in enumerate(different.values()):
        try:
            left_s = deadline - monotonic()
            if left_s <= 0:
                return f"{number} of {len(different)} models took {timeout_s:g} s"
            model_size(config, timeout_s=left_s)
        except UnknownSizeError as error:
            return str(error)
    return ""
