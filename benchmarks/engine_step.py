"""What clipping and one AdEMAMix step cost through each engine on a CPU, beside a plain stream of the same bytes.

    python benchmarks/engine_step.py

A process for each engine, alone in its group, with a model whose forward and backward pass do nothing but hand out
gradients. Beside each step a stream of its 36 bytes a parameter is timed. The same model under DeepSpeed's own step,
with the same optimizer and DeepSpeed's clipping, shows what these engines leave out. The backward pass is timed too:
what an engine saved in the step and paid there would be no gain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimizer_step import Stream, machine, seconds
from torch import nn

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine_step"
LIMIT = 1e-3
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
    "fsdp2": {"kind": "fsdp2"},
}
STOCK = {f"DeepSpeed stage {stage}, its own step": stage for stage in (1, 2, 3)}
ROWS = [
    *((name, precision) for name in ENGINES for precision in ("fp32", "bf16") if name != "ddp" or precision == "fp32"),
    *((name, precision) for name in STOCK for precision in ("fp32", "bf16")),
]
#: Seconds between two samples that the stream runs for.
STREAM_S = 0.05


class HandOut(torch.autograd.Function):
    """Returns its first argument; in the backward pass the parameters get the gradients that lie ready."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ready: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        """Remember what to hand out."""
        ctx.ready = [gradient.to(p.dtype) for gradient, p in zip(ready, parameters, strict=True)]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[Any, ...]:
        """Hand it out."""
        return gradient[0], None, *ctx.ready


class Block(nn.Module):
    """Two parameters of one size, as far as their numbers allow."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        rows = max(1, numel // 2 // 1024)
        self.parameters_ = nn.ParameterList([torch.randn(rows, 1024), torch.randn(rows, 1024)])
        self.ready = [torch.randn_like(p) * 1e-3 for p in self.parameters_]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``."""
        return HandOut.apply(x, self.ready, *self.parameters_)  # type: ignore[no-any-return, no-untyped-call]


class Model(nn.Module):
    """Blocks that cost nothing."""

    def __init__(self, *, data: Any, numel: int) -> None:
        super().__init__()
        self.num_out = len(data.prognostic)
        self.blocks = nn.ModuleList([Block(numel // 12) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last state: persistence."""
        x = x.requires_grad_()
        for block in self.blocks:
            x = block(x)
        return x[:, -1, ..., : self.num_out]


def make_module(engine: dict[str, Any], *, numel: int, precision: str) -> Any:
    """Return the training module around the model."""
    from anemoi_dist.config.parse import from_container
    from anemoi_dist.data.batch import DataSpec
    from anemoi_dist.tasks.forecast.module import BaseGraphModule

    config = from_container(
        {
            "training": {
                "max_steps": 1000,
                "global_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
                "lr": {"rate": 1e-6},
                "optimizer": {"_target_": "anemoi_dist.optimizers.ademamix.AdEMAMix", "weight_decay": 0.01},
                "clip_grad_norm": LIMIT,
                "precision": precision,
            },
            "engine": engine,
            "data": {"kind": "synthetic"},
            "model": {"_target_": "engine_step.Model", "numel": numel},
            "security": {"allowed_targets": ["engine_step"]},
        }
    )
    grid = 8
    spec = DataSpec(
        variables=("msl",),
        forcing=(),
        latitudes=np.linspace(-80, 80, grid),
        longitudes=np.linspace(0, 350, grid),
        field_shape=(grid,),
        mean=np.zeros(1),
        stdev=np.ones(1),
        tendency_stdev=np.ones(1),
        multistep_input=1,
        frequency_s=21_600,
    )
    torch.manual_seed(0)
    return BaseGraphModule(config, spec=spec)


def make_batch() -> Any:
    """Return two states."""
    from anemoi_dist.data.batch import Batch

    return Batch(torch.randn(1, 2, 1, 8, 1), torch.zeros(1, dtype=torch.int64))


def through_engine(module: Any, world: Any) -> tuple[Callable[[], None], Callable[[], object]]:
    """Return what fills the gradients and what clips and steps, of one of our engines."""
    from anemoi_dist.engines.registry import create_engine

    engine: Any = create_engine(module, config=module.config, world=world)
    batch = make_batch()

    def backward() -> None:
        engine._backward(engine._forward(batch), is_last=True)

    return backward, engine._update


def through_deepspeed(module: Any, stage: int) -> tuple[Callable[[], None], Callable[[], object]]:
    """Return the same for DeepSpeed's own clipping and step around the same optimizer."""
    from anemoi_dist.engines.zero import _import_deepspeed

    config: dict[str, Any] = {
        "train_batch_size": int(os.environ["WORLD_SIZE"]),
        "gradient_clipping": LIMIT,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
    }
    if module.config.training.precision == "bf16":
        module.compute_dtype = torch.bfloat16
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
    deepspeed = _import_deepspeed()
    optimizer = module.configure_optimizers()["optimizer"]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    batch = make_batch()
    return lambda: engine.backward(engine(batch)), engine.step


def measure(name: str, precision: str, *, numel: int, rounds: int) -> dict[str, object]:
    """Return the ratios of clip + step, and of the backward pass, to the stream."""
    from anemoi_dist.distributed.world import World

    torch.set_num_threads(1)
    world = World.join()
    module = make_module(ENGINES.get(name, {"kind": "ddp"}), numel=numel, precision=precision)
    numel = sum(p.numel() for p in module.parameters())
    backward, update = through_deepspeed(module, STOCK[name]) if name in STOCK else through_engine(module, world)
    stream = Stream(numel, num_threads=1)
    repeat = 1
    samples = []
    for round_ in range(rounds + 2):
        backward_s = seconds(backward, 1)
        if round_ == 0:
            repeat = max(1, round(STREAM_S / seconds(lambda: stream.run(4), 1)))
        stream_s = seconds(lambda: stream.run(4), repeat)
        samples.append((seconds(update, 1), backward_s, stream_s))
    del samples[:2]
    result: dict[str, object] = {}
    for index, key in enumerate(("step", "backward")):
        low, middle, high = statistics.quantiles([sample[index] / sample[2] for sample in samples], n=4)
        result[key] = {"ratio": middle, "quartiles": [low, high]}
    result["seconds"] = statistics.median(sample[0] for sample in samples)
    result["stream_gb_per_s"] = 36 * numel / statistics.median(sample[2] for sample in samples) / 1e9
    return result


def report(data: dict) -> str:
    """Return the page."""
    where = data["machine"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "deepspeed"))
    lines = ["| engine | precision | clip + step | backward |", "|---|---|---|---|"]
    for key, result in data["results"].items():
        cells = []
        for part in ("step", "backward"):
            low, high = result[part]["quartiles"]
            cells.append(f"{result[part]['ratio']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join(key.split(':'))} | {' | '.join(cells)} |")
    return (
        "# Clipping and stepping through the engines\n\n"
        f"AdEMAMix on {data['numel'] / 1e6:g}M parameters, one process alone in its group, one thread. Times over that "
        "of a plain stream of 36 bytes a parameter, measured beside each; median and quartiles of "
        f"{data['rounds']} rounds. The backward pass computes nothing: it hands out gradients, and the engine moves "
        "them to where the step reads them.\n\n"
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} at the start; {versions}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    """Run everything and write ``results/engine_step.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engines", nargs="+", default=[*ENGINES, *STOCK])
    parser.add_argument("--output", type=Path, default=RESULTS, help="without a suffix")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        result = measure(*arguments.one, numel=arguments.numel, rounds=arguments.rounds)
        arguments.output.write_text(json.dumps(result))
        os._exit(0)  # engines need no tidy end here
    data: dict = {"machine": machine(), "rounds": arguments.rounds, "numel": arguments.numel, "results": {}}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name, precision in ROWS:
        if name not in arguments.engines:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            options = ["--numel", arguments.numel, "--rounds", arguments.rounds, "--output", output]
            options += ["--one", name, precision]
            began = time.perf_counter()
            subprocess.run([sys.executable, __file__, *map(str, options)], env=environment, check=True)
            data["results"][f"{name}:{precision}"] = result = json.loads(output.read_text())
            print(
                f"{name} {precision}: clip + step {result['step']['ratio']:.2f}, backward "
                f"{result['backward']['ratio']:.2f} ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
        arguments.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(report(data))
    print(report(data))


if __name__ == "__main__":
    main()
