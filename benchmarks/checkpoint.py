"""Checkpoints beside torch's distributed checkpoint (DCP), torch.save and raw writes, in one run on one machine.

    python benchmarks/checkpoint.py

One rank, fp32 parameters and AdEMAMix's three EMA states. All methods take turns in every round; medians count. CPU
seconds are of the whole process, threads and kernel included; all files are flushed to the disk. Loading is from the
page cache. Writes ``results/checkpoint.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from anemoi_dist.checkpoint import writer
from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Saver
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.schema import CheckpointConfig
from anemoi_dist.distributed.world import World
from anemoi_dist.optimizers.ademamix import AdEMAMix

RESULTS = Path(__file__).parent / "results"
GIB, MIB = 1024**3, 1024**2
ORIGIN = Origin(engine="ddp", config_hash="0", versions={})
EMAS = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")


def make_state(size_mib: int, *, num_tensors: int) -> dict[str, torch.Tensor]:
    """Return a state of random tensors: each parameter with its three EMA states."""
    numel = size_mib * MIB // 4 // num_tensors // 4
    return {
        f"layer{index}.weight:{kind}": torch.randn(numel) for index in range(num_tensors) for kind in ("param", *EMAS)
    }


def shards_of(state: dict[str, torch.Tensor]) -> list[Shard]:
    """Return the state as one rank's ranges."""
    return [Shard(*key.split(":"), tuple(tensor.shape), 0, tensor) for key, tensor in state.items()]


# Saving


def save_raw(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the bytes and nothing else."""
    with (folder / "data").open("xb", buffering=0) as stream:
        for tensor in state.values():
            stream.write(tensor.numpy().data)
        os.fsync(stream.fileno())


def save_torch(state: dict[str, torch.Tensor], folder: Path) -> None:
    """torch.save."""
    with (folder / "data").open("xb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def save_dcp(state: dict[str, torch.Tensor], folder: Path) -> None:
    """DCP, which flushes by default."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))


def save_ours(state: dict[str, torch.Tensor], folder: Path, *, read_back: bool = False) -> None:
    """Hash, write, flush, commit."""
    store = LocalStore(folder)
    save = store.begin(1, "0" * 16)
    report = writer.write_rank(save, shards_of(state), save_id="0" * 16, rank=0, read_back=read_back)
    writer.commit(store, save, [report], save_id="0" * 16, step=1, samples_seen=0, origin=ORIGIN, trainer={})


def save_ours_read_back(state: dict[str, torch.Tensor], folder: Path) -> None:
    """The same, and every byte read back and checked before the commit."""
    save_ours(state, folder, read_back=True)


SAVERS = {
    "raw write": save_raw,
    "anemoi-dist": save_ours,
    "anemoi-dist, read back": save_ours_read_back,
    "DCP save": save_dcp,
    "torch.save": save_torch,
}


# Loading


def load_raw(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Read into the tensors that are there."""
    with (folder / "data").open("rb", buffering=0) as stream:
        for tensor in state.values():
            stream.readinto(tensor.numpy().data)


def load_torch(state: dict[str, torch.Tensor], folder: Path) -> None:
    """torch.load and a copy to where the values belong."""
    for key, tensor in torch.load(folder / "data", weights_only=True).items():
        state[key].copy_(tensor)


def load_dcp(state: dict[str, torch.Tensor], folder: Path) -> None:
    """DCP loads in place; it checks nothing."""
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))


def load_ours(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Every block that is read is checked."""
    checkpoint = Checkpoint(LocalStore(folder).path(1))
    for key, tensor in state.items():
        checkpoint.read(*key.split(":"), start=0, out=tensor)
    checkpoint.close()


LOADERS = {"raw write": load_raw, "anemoi-dist": load_ours, "DCP save": load_dcp, "torch.save": load_torch}


# Measuring


def measure(function: Callable[[], None]) -> dict[str, float]:
    """Run once; return CPU and wall seconds and the most memory used beyond what was in use before, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_mib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    result = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return {**result, "extra_mib": _status_mib("VmHWM") - before}


def _status_mib(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def compare(state: dict[str, torch.Tensor], root: Path, *, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Save and load with every method in turn; return the medians."""
    saved: dict[str, list[dict[str, float]]] = {name: [] for name in SAVERS}
    loaded: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    target = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for number in range(rounds + 1):
        for name, save in SAVERS.items():
            folder = root / "save"
            folder.mkdir()
            result = measure(lambda save=save, folder=folder: save(state, folder))
            saved[name] += [result] if number else []  # the first round warms up
            if name in LOADERS:
                for tensor in target.values():
                    tensor.zero_()
                result = measure(lambda name=name, folder=folder: LOADERS[name](target, folder))
                loaded[name] += [result] if number else []
                assert all(torch.equal(target[key], tensor) for key, tensor in state.items()), name
            shutil.rmtree(folder)
            os.sync()
    return {"save": _medians(saved), "load": _medians(loaded)}


def _medians(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}


# A loop that saves


class Training:
    """A real step: a network of linear layers and AdEMAMix."""

    def __init__(self, *, width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))
        self.optimizer = AdEMAMix(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(batch, width)
        self.step()

    def step(self) -> None:
        """Do one optimizer step."""
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Return parameters and EMA states, not copied."""
        state = {}
        for name, parameter in self.model.named_parameters():
            state[f"{name}:param"] = parameter.detach().reshape(-1)
            held = self.optimizer.state[parameter]
            state |= {f"{name}:{kind}": held[kind].reshape(-1) for kind in EMAS}
        return state


def loop(training: Training, root: Path, world: World, *, method: str, num_steps: int, interval: int) -> dict:
    """Train with a save every ``interval`` steps; return how long the loop took and how long it stood still."""
    folder = root / "loop"
    folder.mkdir()
    outcomes: list[Any] = []
    saver = Saver(
        LocalStore(folder),
        world=world,
        config=CheckpointConfig(keep_last=2),
        origin=ORIGIN,
        report=outcomes.append,
    )
    if method == "anemoi-dist":
        saver.prepare(shards_of(training.state()))
    future, stalled, cpu = None, 0.0, time.process_time()
    begun = time.perf_counter()
    for step in range(1, num_steps + 1):
        training.step()
        since = time.perf_counter()
        if method == "anemoi-dist":
            saver.advance(saver.word(stop=0, save_due=False))
        if step % interval == 0 and step < num_steps:
            if method == "anemoi-dist":
                saver.save(step, lambda: shards_of(training.state()), samples_seen=0, trainer={})
            elif method == "DCP async_save":
                if future is not None:
                    future.result()
                future = dcp.async_save(training.state(), checkpoint_id=folder / f"step-{step}")
            elif method == "DCP save":
                save_dcp(training.state(), folder / f"step-{step}")
        stalled += time.perf_counter() - since
    seconds = time.perf_counter() - begun
    saver.wait()
    if future is not None:
        future.result()
    assert not any(outcome.error for outcome in outcomes)
    shutil.rmtree(folder)
    return {"seconds": seconds, "stalled_s": stalled, "cpu_s": time.process_time() - cpu}


def compare_loops(root: Path, world: World, *, rounds: int, num_steps: int, interval: int) -> dict[str, Any]:
    """Run the loop with every method in turn; return the medians."""
    training = Training(width=1024, batch=256)
    results: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("no saves", "anemoi-dist", "DCP async_save", "DCP save")
    }
    for _ in range(rounds):
        for name, runs in results.items():
            runs.append(loop(training, root, world, method=name, num_steps=num_steps, interval=interval))
            os.sync()
    size_mib = sum(tensor.nbytes for tensor in training.state().values()) / MIB
    return {"state_mib": size_mib, "num_steps": num_steps, "interval": interval, "methods": _medians(results)}


# Reporting


def machine() -> str:
    """Describe where this runs."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores (load {load:.1f} at the start), Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread"
    )


def report(size_mib: int, compared: dict[str, Any], loops: dict[str, Any], *, where: str) -> str:
    """Return the result as Markdown."""
    size_gib = size_mib / 1024
    lines = [
        f"# Saving and loading {size_mib} MiB\n",
        f"{where}.\n",
        "CPU seconds a GiB, and their ratio to DCP in the same run; memory beyond what was in use before.\n",
        "| save | CPU s/GiB | of DCP | wall s/GiB | extra MiB |",
        "|---|---|---|---|---|",
    ]
    for kind, reference in (("save", "DCP save"), ("load", "DCP save")):
        base = compared[kind][reference]
        for name, r in compared[kind].items():
            cpu, wall = (r[key] / size_gib for key in ("cpu_s", "wall_s"))
            of_dcp = f"{r['cpu_s'] / base['cpu_s']:.2f}"
            speed = f"{wall:.2f}" if kind == "save" else f"{1 / wall:.2f} | {base['wall_s'] / r['wall_s']:.2f}"
            lines.append(f"| {name} | {cpu:.2f} | {of_dcp} | {speed} | {r['extra_mib']:.0f} |")
        if kind == "save":
            lines += [
                "\nOnly anemoi-dist checks what it loads.\n",
                "| load | CPU s/GiB | of DCP | GiB/s | of DCP | extra MiB |",
                "|---|---|---|---|---|---|",
            ]
    lines += [
        f"\nA loop of {loops['num_steps']} steps that saves {loops['state_mib']:.0f} MiB every {loops['interval']}. "
        "Standing still: time inside the calls that save. On a machine that others use too the length of the loop says "
        "little.\n",
        "| loop | s/step | standing still | longer than without saves | CPU s |",
        "|---|---|---|---|---|",
    ]
    without = loops["methods"]["no saves"]["seconds"]
    for name, r in loops["methods"].items():
        still, longer = r["stalled_s"] / r["seconds"], r["seconds"] / without - 1
        step_s = r["seconds"] / loops["num_steps"]
        lines.append(f"| {name} | {step_s:.3f} | {100 * still:.2f} % | {100 * longer:+.1f} % | {r['cpu_s']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--tensors", type=int, default=64, help="parameters; each has three EMA states")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--interval", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    world = World.join()
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        state = make_state(arguments.size_mib, num_tensors=arguments.tensors)
        compared = compare(state, root, rounds=arguments.rounds)
        del state
        loops = compare_loops(
            root, world, rounds=arguments.loop_rounds, num_steps=arguments.steps, interval=arguments.interval
        )
    finally:
        shutil.rmtree(root)
        world.leave()
    text = report(arguments.size_mib, compared, loops, where=where)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint.md").write_text(text)
    data = {"machine": where, "size_mib": arguments.size_mib, **compared, "loop": loops}
    (RESULTS / "checkpoint.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
