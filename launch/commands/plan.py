"""``anemoi-dist plan``: show what would be started, and what a rank would hold, as text or as JSON. No torch."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from anemoi_dist.config.schema import Config
from anemoi_dist.engines.memory_estimate import NOT_COUNTED, ExpectedMemory, ModelSize, Parameter, state_bytes
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


def run(options: argparse.Namespace) -> int:
    """Print the plan, or with ``--sweep`` the table of engines."""
    config = compose_options(options).config
    print(
        show(
            config,
            sweep=options.sweep,
            as_json=options.json,
            num_parameters=options.num_parameters,
            device_gib=options.device_memory_gib,
        )
    )
    return ExitCode.FINISHED


def show(
    config: Config,
    *,
    sweep: bool = False,
    as_json: bool = False,
    num_parameters: str | None = None,
    device_gib: str | None = None,
) -> str:
    """Look at this machine and at the model, and return what ``anemoi-dist plan`` prints.

    Parameters
    ----------
    config : Config
        The configuration, with a run id.
    sweep : bool
        The table of :func:`.memory_table.memory_table` instead of the plan.
    as_json : bool
        JSON instead of text.
    num_parameters, device_gib : str, optional
        Numbers as the user typed them.

    Raises
    ------
    ConfigError
        A number is none, or the configuration cannot be launched.
    PreflightError
        A table was asked for, and the model cannot be built here.
    """
    number = _number("--num-parameters", num_parameters, example="1e9")
    gib = _number("--device-memory-gib", device_gib, example="80")
    if number is not None and not number.is_integer():
        raise ConfigError("--num-parameters", num_parameters, "must be a whole number", fix="--num-parameters 1e9")
    run = RunDirectory.locate(config.run.root, str(config.run.id))
    machine = detect_machine(config.launcher.kind)
    # What cannot be launched is refused before a model is built.
    planned = None if sweep else plan(config, run, machine)
    sizes = Sizes(
        *_model(config, None if number is None else int(number)),
        _device_bytes(config) if gib is None else int(gib * _GIB),
    )
    if planned is None:
        if sizes.model is None:
            raise PreflightError(f"the size of the model is unknown: {sizes.unknown}\n  fix: --num-parameters N")
        rows = memory_table(config, sizes.model)
        return _json(sweep_as_dict(config, sizes, rows)) if as_json else "\n".join(_sweep_lines(config, sizes, rows))
    planned = plan(config, run, machine, model=sizes.model, device_bytes=sizes.device_bytes)
    if as_json:
        return _json(plan_as_dict(config, run, planned, sizes))
    return "\n".join(_plan_lines(config, run, planned, sizes))


def _number(option: str, text: str | None, *, example: str) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1e15:
        raise ConfigError(option, text, "must be a positive number", fix=f"{option} {example}")
    return value


def _model(config: Config, num_parameters: int | None) -> tuple[ModelSize | None, str]:
    """Return the size of the model, or why it is not known."""
    if num_parameters is not None:
        return ModelSize([Parameter((num_parameters,))]), ""
    try:
        return model_size(config), ""
    except UnknownSizeError as error:
        return None, str(error)


def _device_bytes(config: Config) -> int | None:
    # The GPU of a login node is not the job's.
    return device_memory_bytes() if config.launcher.kind == "local" else None


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
    return min(sizes, default=None)


def plan_as_dict(config: Config, run: RunDirectory, planned: Plan, sizes: Sizes) -> dict[str, Any]:
    """Return what ``anemoi-dist plan --json`` prints."""
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
        "memory": planned.memory and _memory_as_dict(planned.memory),
        "device_share": planned.share,
        **_sizes_as_dict(config, sizes),
    }


def sweep_as_dict(config: Config, sizes: Sizes, rows: Sequence[Row]) -> dict[str, Any]:
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


def _memory_as_dict(memory: ExpectedMemory) -> dict[str, Any]:
    return {**asdict(memory), "device": memory.device, "host": memory.host}


def _sizes_as_dict(config: Config, sizes: Sizes) -> dict[str, Any]:
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


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2)


def _plan_lines(config: Config, run: RunDirectory, planned: Plan, sizes: Sizes) -> Iterator[str]:
    batches = planned.batches
    yield f"run         {run.run_id} in {run.path}"
    yield f"launcher    {planned.kind}: {_count(planned.nodes, 'node')} x {_count(planned.ranks_per_node, 'rank')}"
    yield (
        f"batch       {_count(batches.global_size, 'sample')} a step = {_count(batches.world_size, 'rank')} x "
        f"{_count(batches.accumulation, 'micro-batch', 'micro-batches')} x {batches.micro_size}"
    )
    overlap = ", overlap" if config.engine.overlap else ""
    yield f"engine      {config.engine.spec.name}{overlap}, {config.training.precision}"
    yield f"rendezvous  {planned.rendezvous}"
    yield from (f"note        {note}" for note in planned.notes)
    yield from _model_lines(sizes)
    if planned.memory is not None:
        yield from _memory_lines(planned.memory, planned)
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


def _memory_lines(memory: ExpectedMemory, planned: Plan) -> Iterator[str]:
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
    share = "" if planned.share is None else f", {planned.share:.0%} of {format_bytes(planned.device_bytes or 0)}"
    warning = "  DOES NOT FIT" if planned.share is not None and planned.share > 1 else ""
    yield f"  {'sum':<22}{format_bytes(memory.device):>10}  device{share}{warning}"
    if memory.host:
        node = format_bytes(memory.host * planned.ranks_per_node)
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
    if problem := next((row.batch_problem for row in rows if row.batch_problem), ""):
        yield f"* the batch cannot be cut over so many: {problem}"
    one, many = (format_bytes(row.memory["zero3_offload"].host) for row in (rows[0], rows[-1]))
    yield f"zero3_offload: beside it {one} of host memory for 1 rank, {many} for each of {rows[-1].world_size}"
    yield from _notes(config, sizes)
