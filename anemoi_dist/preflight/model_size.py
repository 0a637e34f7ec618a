"""Print the size of a configuration's model: ``python -m anemoi_dist.preflight.model_size < config.yaml``.

It is a process of its own because building a model takes torch, which the control side does not import, and opening its
dataset may take long. ``launch/launchers/model_size.py`` starts it. The output is one JSON object: a
:class:`ModelSize`, or ``{"refused": {...}}`` with the arguments of the ConfigError that every machine would raise.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from anemoi_dist.config.parse import from_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.engines.memory_estimate import ModelSize, Parameter
from anemoi_dist.errors import AnemoiDistError, ConfigError, ExitCode, print_message

if TYPE_CHECKING:
    from anemoi_dist.tasks.base import Task, TaskModule


def main() -> int:
    """Read a configuration and print the size of its model; an error of this machine is the last line of stderr."""
    # A model or a library may print while it is built: only the answer may go to the standard output.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        size = measure(from_yaml(sys.stdin.read()))
    except ConfigError as error:
        if not _is_about_here(error):
            refused = {name: getattr(error, name) for name in ("key", "value", "rule", "fix", "valid")}
            with answer:
                json.dump({"refused": refused}, answer, default=str)
            return int(error.exit_code)
        print_message(" ".join(str(error).split()))
        return int(ExitCode.PREFLIGHT)
    except AnemoiDistError as error:
        print_message(" ".join(str(error).split()))
        return int(error.exit_code)
    except Exception as error:
        print_message(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return int(ExitCode.INTERNAL)
    with answer:
        json.dump(asdict(size), answer)
    return int(ExitCode.FINISHED)


def measure(config: Config) -> ModelSize:
    """Build the module of a configuration, its optimizer too, and return its size.

    The model is built without memory for its values (torch's ``meta`` device) if its code permits.

    Parameters
    ----------
    config : Config
        Its ``data`` determines the fields of the model.
    """
    import torch

    from anemoi_dist.engines.registry import check_state
    from anemoi_dist.tasks import create_task
    from anemoi_dist.tasks.base import freeze
    from anemoi_dist.tasks.rehearsal import rehearse

    task = create_task(config)
    module = _build(task)
    freeze(module, config.training.freeze)
    check_state(module)
    if all(parameter.is_meta for parameter in module.parameters()):
        rehearse(task, module, config, device=torch.device("meta"))
    _check_optimizer(module)
    own = {
        name: sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        for name, layer in module.named_modules()
    }
    return ModelSize(
        parameters=[Parameter(tuple(each.shape), each.requires_grad) for each in module.parameters()],
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()),
        largest_layer=max(own.items(), key=lambda layer: layer[1]),
    )


def _is_about_here(error: ConfigError) -> bool:
    """Whether another machine may think otherwise: it may have the dataset, or a library that this one lacks."""
    cause = error.__cause__
    return isinstance(cause, ImportError) or (error.key == "data.dataset" and cause is not None)


def _build(task: Task) -> TaskModule:
    import torch

    try:
        with torch.device("meta"):
            return task.create_module(world_size=1)
    except AnemoiDistError:
        raise
    except Exception:  # a model that looks at values while it is built (a graph, a mesh) cannot do without them
        return task.create_module(world_size=1)


def _check_optimizer(module: TaskModule) -> None:
    """Refuse arguments of the optimizer or the scheduler that every rank would refuse."""
    try:
        module.configure_optimizers()
    except ConfigError as error:
        # Our own rules hold everywhere. What a library says of this machine or of parameters without values, and what
        # is not installed here, may be otherwise there: the ranks try it.
        of_a_rule = error.__cause__ is None or isinstance(error.__cause__, ConfigError)
        if of_a_rule and not error.key.endswith(".implementation"):
            raise
    except Exception:  # noqa: S110
        pass  # likewise


if __name__ == "__main__":
    sys.exit(main())
