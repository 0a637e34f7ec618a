"""``anemoi-dist plan``: show what would be started, and what a rank would hold, as text or as JSON. No torch."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from anemoi_dist.config.schema import Config
from anemoi_dist.engines.memory_estimate import (
    NOT_COUNTED,
    ExpectedMemory,
    ModelSize,
    Parameter,
    expected_memory,
    state_bytes,
)
from anemoi_dist.errors import ConfigError, ExitCode, PreflightError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.progress import format_bytes

from ..launchers.base import Plan, plan
from ..launchers.machine import detect_machine
from ..launchers.memory_table import Row, memory_table
from ..launchers.model_size import UnknownSizeError, model_size
from .arguments import compose_options

_GIB = 1024**3
_MIB = 1024**2


@dataclass(frozen=True)
class Sizes:
    """Size of the model and of the device, None if unknown; ``unknown`` says why there is no model."""

    model: ModelSize | None
    unknown: str
    device_bytes: int | None

    def memory(self, config: Config, world_size: int) -> ExpectedMemory | None:
        """Return the memory of the fullest rank."""
        return None if self.model is None else expected_memory(config, self.model, world_size=world_size)

    def share(self, memory: ExpectedMemory | None) -> float | None:
        """Return the part of the device that a rank needs, without activations; 1 is all of it."""
        return None if memory is None or self.device_bytes is None else memory.device / self.device_bytes


def run(options: argparse.Namespace) -> int:
    """Print the plan, or with ``--sweep`` the table of engines."""
    num_parameters = _number("--num-parameters", options.num_parameters, example="1e9")
    if num_parameters is not None and not num_parameters.is_integer():
        rule = "must be a whole number"
        raise ConfigError("--num-parameters", options.num_parameters, rule, fix="--num-parameters 1e9")
    gib = _number("--device-memory-gib", options.device_memory_gib, example="80")
    device_bytes = None if gib is None else int(gib * _GIB)
    config = compose_options(options).config
    show = show_sweep if options.sweep else show_plan
    model = None if num_parameters is None else ModelSize([Parameter((int(num_parameters),))])
    print(show(config, model=model, device_bytes=device_bytes, as_json=options.json))
    return ExitCode.FINISHED


def show_plan(
    config: Config, *, model: ModelSize | None = None, device_bytes: int | None = None, as_json: bool = False
) -> str:
    """Return what ``anemoi-dist plan`` prints; this machine is inspected and the model built where neither is given.

    Parameters
    ----------
    config : Config
        The configuration, with a run id.
    model : ModelSize, optional
        Instead of the size of the configured model.
    device_bytes : int, optional
        Instead of the memory of this machine's GPUs.
    as_json : bool, optional
        JSON instead of text.

    Raises
    ------
    ConfigError
        The configuration cannot be launched, or the model cannot be built anywhere.
    """
    run, machine = RunDirectory.locate(config.run.root, str(config.run.id)), detect_machine(config.launcher.kind)
    planned = plan(config, run, machine)  # refuses before a model is built, which takes seconds
    sizes = _sizes(config, model, device_bytes)
    if as_json:
        return json.dumps(plan_as_dict(config, run, planned, sizes), indent=2)
    return "\n".join(_plan_lines(config, run, planned, sizes))


def show_sweep(
    config: Config, *, model: ModelSize | None = None, device_bytes: int | None = None, as_json: bool = False
) -> str:
    """Return what ``anemoi-dist plan --sweep`` prints; parameters as of :func:`show_plan`.

    Raises
    ------
    PreflightError
        The model cannot be built here.
    """
    sizes = _sizes(config, model, device_bytes)
    if sizes.model is None:
        raise PreflightError(f"the size of the model is unknown: {sizes.unknown}\n  fix: --num-parameters N")
    rows = memory_table(config, sizes.model)
    if as_json:
        return json.dumps(sweep_as_dict(config, sizes, rows), indent=2)
    return "\n".join(_sweep_lines(config, sizes, rows))


def _number(option: str, text: str | None, *, example: str) -> float | None:
    if text is None:
        return None
    # Read as a float, so that 1e9 will do.
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1e15:
        raise ConfigError(option, text, "must be a positive number", fix=f"{option} {example}")
    return value


def _sizes(config: Config, model: ModelSize | None, device_bytes: int | None) -> Sizes:
    unknown = ""
    if model is None:
        try:
            model = model_size(config)
        except UnknownSizeError as error:
            unknown = str(error)
    if device_bytes is None and config.launcher.kind == "local":  # the GPU of a login node is not the job's
        device_bytes = device_memory_bytes()
    return Sizes(model, unknown, device_bytes)


def device_memory_bytes() -> int | None:
    """Return the memory of the smallest GPU of this machine; None where the driver names none."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (subprocess.SubprocessError, OSError):
        return None
    sizes = [int(mib) * _MIB for mib in listed if mib.isdecimal()]
    return min(sizes, default=None)  # a plan has to fit the smallest


def plan_as_dict(config: Config, run: RunDirectory, planned: Plan, sizes: Sizes) -> dict[str, object]:
    """Return what ``anemoi-dist plan --json`` prints."""
    memory = sizes.memory(config, planned.world_size)
    return {
        "run_id": run.run_id,
        "run_directory": str(run.path),
        "launcher": planned.kind,
        "nodes": planned.nodes,
        "ranks_per_node": planned.ranks_per_node,
        "world_size": planned.world_size,
        "batch": asdict(planned.batches),
        "rendezvous": planned.rendezvous,
        "environment": dict(planned.environment),
        "command": list(planned.command),
        "shell": planned.shell(),
        "script": planned.script,
        "notes": list(planned.notes),
        "memory": memory and _memory_as_dict(memory),
        "device_share": sizes.share(memory),
        **_sizes_as_dict(config, sizes),
    }


def sweep_as_dict(config: Config, sizes: Sizes, rows: Sequence[Row]) -> dict[str, object]:
    """Return what ``anemoi-dist plan --sweep --json`` prints."""
    return {
        "sweep": [
            {
                "engine": engine,
                "world_size": row.world_size,
                "fits": None if sizes.device_bytes is None else memory.device <= sizes.device_bytes,
                "batch_problem": row.batch_problem or None,
                "memory": _memory_as_dict(memory),
            }
            for row in rows
            for engine, memory in row.memory.items()
        ],
        **_sizes_as_dict(config, sizes),
    }


def _memory_as_dict(memory: ExpectedMemory) -> dict[str, object]:
    return {**asdict(memory), "device": memory.device, "host": memory.host}


def _sizes_as_dict(config: Config, sizes: Sizes) -> dict[str, object]:
    return {
        "engine": config.engine.spec.name,
        "overlap": config.engine.overlap,
        "precision": config.training.precision,
        "num_parameters": sizes.model and sizes.model.num_parameters,
        "unknown": _unknown(config, sizes),
        "device_bytes": sizes.device_bytes,
        "not_counted": NOT_COUNTED,
    }


def _unknown(config: Config, sizes: Sizes) -> list[str]:
    """Say what memory would depend on and is not known."""
    found = [f"the size of the model: {sizes.unknown}"] if sizes.unknown else []
    if state_bytes(config.training.optimizer) is None:
        found.append(f"the states of {config.training.optimizer['_target_']}")
    if sizes.device_bytes is None:
        found.append("the memory of the device (--device-memory-gib)")
    return found


def _plan_lines(config: Config, run: RunDirectory, planned: Plan, sizes: Sizes) -> Iterator[str]:
    batches = planned.batches
    yield f"run         {run.run_id} in {run.path}"
    yield f"launcher    {planned.kind}: {_count(planned.nodes, 'node')} x {_count(planned.ranks_per_node, 'rank')}"
    yield (
        f"batch       {_count(batches.global_size, 'sample')} a step = {batches.shares_text()} x "
        f"{_count(batches.accumulation, 'micro-batch', 'micro-batches')} x {batches.micro_size}"
    )
    overlap = ", overlap" if config.engine.overlap else ""
    yield f"engine      {config.engine.spec.name}{overlap}, {config.training.precision}"
    yield f"rendezvous  {planned.rendezvous}"
    yield from (f"note        {note}" for note in planned.notes)
    yield from _model_lines(sizes)
    if (memory := sizes.memory(config, planned.world_size)) is not None:
        yield from _memory_lines(memory, sizes, ranks_per_node=planned.ranks_per_node)
    yield from _notes(config, sizes)
    yield "environment"
    yield from (f"  {name}={value}" for name, value in planned.environment.items())
    if planned.script is not None:
        yield "script"
        yield from (f"  {line}".rstrip() for line in planned.script.splitlines())
    yield "command (in a run directory that is prepared)"
    yield f"  {planned.shell()}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _model_lines(sizes: Sizes) -> Iterator[str]:
    if sizes.model is None:
        return
    tensors = len(sizes.model.parameters)
    shape = f"in {_count(tensors, 'tensor')}" if sizes.model.largest_layer else "as one tensor"
    yield f"model       {sizes.model.num_parameters} parameters {shape}"
    if sizes.model.largest_layer:
        name, size = sizes.model.largest_layer
        yield f"            the largest layer is {name or 'the model itself'}, {size} parameters"


def _memory_lines(memory: ExpectedMemory, sizes: Sizes, *, ranks_per_node: int) -> Iterator[str]:
    moved = "host" if memory.offloaded else "device"
    parts = [
        ("parameters", memory.parameters, "device"),
        ("fp32 masters", memory.master, moved),
        *((name, size, moved) for name, size in memory.states.items()),
        ("gradients", memory.gradients, moved),
        ("their fp32 copy", memory.update, moved),
        ("communication buckets", memory.communication, "device"),
        ("buffers", memory.buffers, "device"),
        ("checkpoint staging", memory.staging, "host"),
    ]
    yield "memory of the fullest rank, at most"
    yield from (f"  {name:<22}{format_bytes(size):>10}  {place}" for name, size, place in parts if size)
    share = sizes.share(memory)
    part = "" if share is None else f", {share:.0%} of {format_bytes(sizes.device_bytes or 0)}"
    warning = "  DOES NOT FIT" if share is not None and share > 1 else ""
    yield f"  {'sum':<22}{format_bytes(memory.device):>10}  device{part}{warning}"
    if memory.host:
        node = format_bytes(memory.host * ranks_per_node)
        yield f"  {'sum':<22}{format_bytes(memory.host):>10}  host, {node} a node"


def _notes(config: Config, sizes: Sizes) -> Iterator[str]:
    if sizes.model is not None:
        yield f"  not counted: {NOT_COUNTED}"
    yield from (f"  unknown: {what}" for what in _unknown(config, sizes))


def _sweep_lines(config: Config, sizes: Sizes, rows: Sequence[Row]) -> Iterator[str]:
    yield from _model_lines(sizes)
    yield f"GiB of device memory of the fullest rank, at most, {config.training.precision}"
    yield "   ranks" + "".join(f"{engine:>15}" for engine in rows[0].memory)
    limit = math.inf if sizes.device_bytes is None else sizes.device_bytes
    for row in rows:
        needed = [memory.device for memory in row.memory.values()]
        cells = "".join(f"{size / _GIB:>14.2f}{'!' if size > limit else ' '}" for size in needed)
        yield f"{row.world_size:>7}{'*' if row.batch_problem else ' '}{cells}".rstrip()
    if sizes.device_bytes is not None:
        yield f"! does not fit into {format_bytes(sizes.device_bytes)}"
    # The first is enough: the number of ranks is all that differs in the others.
    if problem := next((row.batch_problem for row in rows if row.batch_problem), ""):
        yield f"* the batch cannot be cut over so many: {problem}"
    one, many = (format_bytes(row.memory["zero3_offload"].host) for row in (rows[0], rows[-1]))
    yield f"zero3_offload: in addition {one} of host memory for 1 rank, {many} for each of {rows[-1].world_size}"
    yield from _notes(config, sizes)
