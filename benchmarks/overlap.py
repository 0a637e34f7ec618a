"""What ``engine.overlap`` gains: one step of two gloo ranks with and without it, by turns, in one run.

    python benchmarks/overlap.py

Both ranks hold two engines, equal but for ``engine.overlap``, around the model of ``engine_step.py``. What is timed is
clipping and step (at ZeRO 1 and 2 with the gathering of the parameters that ends it), and the whole: forward pass, in
which FSDP2 gathers, backward pass, in which with overlap the norm is taken, and that. The ranks run in a network
namespace of their own, so that the loopback's counters are theirs alone, first at full speed and then slowed down to
what ``tc`` lets through: at full speed a transfer over loopback is a copy by the same cores that step, and there is
nothing to hide it behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from engine_step import ENGINES, make_module, through_engine
from optimizer_step import machine

RESULTS = Path(__file__).parent / "results" / "overlap"
RATES = ("full speed", "8gbit", "2gbit")
#: Measured at once, after one that is not.
STEPS = 3


def bytes_sent() -> int:
    """Return what went over the loopback of this namespace."""
    (line,) = (x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def rank_main(rank: int, arguments: argparse.Namespace, engine: str, rate: str, output: Path) -> None:
    """Measure on one rank; rank 0 writes what it saw."""
    from anemoi_dist.distributed.world import World

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    world = World.join()
    built = {}
    for overlap in (False, True):
        module = make_module({**ENGINES[engine], "overlap": overlap}, numel=arguments.numel, precision="fp32")
        built[overlap] = through_engine(module, world)
    if rank == 0 and rate != "full speed":
        tc = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "1mb", "latency", "100ms"]
        subprocess.run(tc, check=True)
    samples: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for overlap, (backward, update) in built.items():
            backward()
            update()  # the other engine's gathering is over now, and this one's under way
            dist.barrier()
            before, begin, step_s = bytes_sent(), time.perf_counter(), 0.0
            for _ in range(STEPS):
                backward()
                middle = time.perf_counter()
                update()
                step_s += time.perf_counter() - middle
            whole_s = time.perf_counter() - begin
            dist.barrier()
            samples[overlap].append((step_s / STEPS, whole_s / STEPS, (bytes_sent() - before) / STEPS))
    if rank == 0:
        output.write_text(json.dumps({str(overlap).lower(): values for overlap, values in samples.items()}))
    os._exit(0)  # engines need no tidy end here


def summary(samples: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Return medians without and with, and the ratio of neighbours."""
    result: dict[str, Any] = {}
    for index, name in enumerate(("step_s", "whole_s", "bytes_sent")):
        pairs = list(zip((s[index] for s in samples["false"]), (s[index] for s in samples["true"]), strict=True))
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        result[name] = {
            "without": statistics.median(a for a, _ in pairs),
            "with": statistics.median(b for _, b in pairs),
            "ratio": middle,
            "quartiles": [low, high],
        }
    return result


def report(data: dict) -> str:
    """Return the page."""
    where = data["machine"]
    lines = ["| engine | loopback | clip + step | whole step | bytes sent |", "|---|---|---|---|---|"]
    for key, result in data["results"].items():
        cells = key.split(":")
        for name in ("step_s", "whole_s"):
            part = result[name]
            low, high = part["quartiles"]
            times = f"{1000 * part['without']:.0f} to {1000 * part['with']:.0f} ms"
            cells.append(f"{part['ratio']:.2f} ({low:.2f} to {high:.2f}), {times}")
        sent = result["bytes_sent"]
        cells.append(f"{sent['without'] / 1e6:.1f} and {sent['with'] / 1e6:.1f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "# What engine.overlap gains\n\n"
        f"2 gloo ranks, {data['numel'] / 1e6:g}M parameters in fp32, one thread a rank. Time with overlap over time "
        f"without, neighbours in one run: median and quartiles of {data['rounds']} rounds of {STEPS} steps, then the "
        "medians without and with. At zero1 and zero2 the step ends with the gathering of the parameters; fsdp2 "
        "gathers in the forward pass, with overlap a part of it during the step. Bytes sent are those of both ranks in "
        "a whole step, headers included.\n\n"
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} at the start; torch "
        f"{where['versions']['torch']}, deepspeed {where['versions']['deepspeed']}.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Run everything and write ``results/overlap.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--engines", choices=("zero1", "zero2", "fsdp2"), nargs="+", default=("zero2", "fsdp2"))
    parser.add_argument("--rates", nargs="+", default=RATES, help="'full speed', or what tc calls a rate")
    parser.add_argument("--output", type=Path, default=RESULTS, help="without a suffix")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "RATE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    part = arguments.output.with_suffix(".part")
    if arguments.one:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        multiprocessing.spawn(rank_main, args=(arguments, *arguments.one, part), nprocs=2)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    data: dict = {"machine": machine(), "rounds": arguments.rounds, "results": {}}
    data["numel"] = arguments.numel
    for engine, rate in itertools.product(arguments.engines, arguments.rates):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = ["unshare", "--map-root-user", "--net", sys.executable, __file__, *sys.argv[1:]]
        subprocess.run([*command, "--one", engine, rate], env=environment, check=True)
        data["results"][f"{engine}:{rate}"] = summary(json.loads(part.read_text()))
        part.unlink()
    arguments.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(report(data))
    print(report(data))


if __name__ == "__main__":
    main()
