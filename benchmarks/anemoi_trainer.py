"""What a step costs here and under anemoi-training's own Trainer: the same model, data and ranks, one step in turn.

    python benchmarks/anemoi_trainer.py [--engine ddp zero2 fsdp2] [--channels 32] [--steps 20]

Two gloo ranks train anemoi-training's default configuration on the sample. After every batch of their Trainer the same
ranks take one step of ours, so that whatever else the machine does slows both. Their step is timed from the end of ours
to the end of theirs: loop, hooks and reading included; ours with reading, too. Also the bytes of optimizer states that
a rank holds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from optimizer_step import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results" / "anemoi_trainer"
#: Steps before the first that counts: compilation, caches.
WARM_UP = 5


def compose(engine: str, channels: int, steps: int) -> Any:
    """Return the configuration: anemoi-training's default on the sample, with AdEMAMix."""
    from support.anemoi_sample import overrides

    from anemoi_dist.config.compose import compose as compose_config

    theirs = [
        *(item for item in overrides(Path("unused"), ranks=2) if not item.startswith("hydra.")),
        f"model.num_channels={channels}",
        "graph.nodes.hidden.node_builder.resolution=2",
        "dataloader.num_workers={training:0,validation:0,test:0}",
        "training/optimization/optimizer=ademamix",
        f"training.max_steps={steps}",
        "dataloader.limit_batches.training=40",
    ]
    empty = RESULTS.parent  # no configuration of its own: theirs is taken from the package
    arguments = ["task=anemoi", f"task.config={empty}", f"task.overrides={json.dumps(theirs)}"]
    return compose_config([*arguments, f"engine={engine}", "launcher.ranks=2", "run.id=benchmark"]).config


def rank(arguments: argparse.Namespace) -> None:
    """Train on this rank in turn; rank 0 prints both lists of seconds and the bytes of states."""
    from support.anemoi import steps_of, train_theirs

    from anemoi_dist.distributed.world import World
    from anemoi_dist.engines.registry import create_engine
    from anemoi_dist.tasks import create_task

    torch.set_num_threads(1)
    steps = arguments.steps + WARM_UP
    world, config = World.join(), compose(arguments.engine, arguments.channels, steps)
    task = create_task(config)
    engine = create_engine(task.create_module(world_size=2), config=config, world=world)
    ours, theirs = [], []
    batches = steps_of(task, config, world)
    last = time.perf_counter()

    def step(_: Any) -> None:
        nonlocal last
        theirs.append(time.perf_counter() - last)
        begin = time.perf_counter()
        engine.train_step(next(batches)[1])
        last = time.perf_counter()
        ours.append(last - begin)

    states = _their_states(train_theirs(world, config, after_batch=step))
    if world.is_main:
        held = sum(engine.memory().states.values())
        print(json.dumps({"ours": ours[WARM_UP:], "theirs": theirs[WARM_UP:], "states": [held, states]}), flush=True)
    world.leave()


def _their_states(trained: dict[str, Any]) -> int:
    # AdEMAMix's three float32 states of every parameter, whole on every rank.
    return 3 * 4 * sum(parameter.numel() for parameter in trained["parameters"].values())


def measure(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start two ranks for one engine and return what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-W", "ignore", __file__, "--rank", "--engine", engine]
    command += ["--channels", str(arguments.channels), "--steps", str(arguments.steps)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    output = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{engine}: a rank has failed")
    return json.loads(output[0].splitlines()[-1])


def main() -> None:
    """Measure each engine, print the table and write it with the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        arguments.engine = arguments.engine[0]
        rank(arguments)
        return
    measured = {engine: measure(engine, arguments) for engine in arguments.engine}
    lines = ["| engine | ours, s | theirs, s | ratio | states of a rank, MB | theirs |", "|---|---|---|---|---|---|"]
    for engine, found in measured.items():
        ratio = statistics.median(a / b for a, b in zip(found["ours"], found["theirs"], strict=True))
        seconds = [statistics.median(found[side]) for side in ("ours", "theirs")]
        states = [number / 1e6 for number in found["states"]]
        lines.append(
            f"| {engine} | {seconds[0]:.3f} | {seconds[1]:.3f} | {ratio:.2f} | {states[0]:.1f} | {states[1]:.1f} |"
        )
    table = "\n".join(lines)
    print(table)
    about = f"Two gloo ranks, {arguments.channels} channels, {arguments.steps} steps of each, {machine()['cpu']}."
    arguments.output.with_suffix(".md").write_text(f"{about}\n\n{table}\n")
    arguments.output.with_suffix(".json").write_text(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
