"""What one optimizer step costs on a GPU, beside its peers and beside a copy of the same bytes within its memory.

    python benchmarks/gpu_optimizer_step.py

One optimizer at a time: of 10^9 parameters one optimizer's tensors take 20 GB. Before each sample a copy is timed, by
the device's own clock. What is reported is the time of a step over that of copying as many bytes as it has to move, so
that its inverse is the share of the copy rate; median, first and last quartile over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from optimizer_step import OURS, ApplesLoop, machine, sizes

RESULTS = Path(__file__).parent / "results" / "gpu_optimizer_step"
#: Bytes that a copy moves for an element of float32.
COPY_BYTES = 8
#: Steps before the first sample: states are created, kernels compiled, clocks raised.
WARM_UP = 5
DEVICE = "cuda"
_Step = Callable[[], object]


def contenders(params: list[torch.Tensor]) -> Iterator[tuple[str, int, Callable[[], _Step]]]:
    """Yield names, bytes that have to be moved for a parameter, and what builds a step; what can't be had raises."""
    from anemoi_dist.optimizers import AdEMAMix

    options = {"lr": 1e-6, "weight_decay": 0.01}

    def ours(**more: object) -> _Step:
        return AdEMAMix(params, **options, **more).step  # type: ignore[arg-type]

    def replayed() -> _Step:
        optimizer = AdEMAMix(params, **options, capturable=True, implementation="triton")  # type: ignore[arg-type]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        return lambda: (graph.replay(), optimizer)  # the graph points into its states, and does not keep them

    def pytorch_optimizer() -> _Step:
        import pytorch_optimizer as peer

        return peer.AdEMAMix(params, lr=1e-6, weight_decay=0.01, weight_decouple=True, foreach=True).step

    def bitsandbytes() -> _Step:
        import bitsandbytes as peer

        return peer.optim.AdEMAMix(params, lr=1e-6).step

    def adamw(**more: object) -> _Step:
        return torch.optim.AdamW(params, **options, **more).step  # type: ignore[arg-type]

    yield f"{OURS}: auto", 36, ours
    yield f"{OURS}: triton", 36, lambda: ours(implementation="triton")
    yield f"{OURS}: triton, a replayed graph", 36, replayed
    yield f"{OURS}: triton, bf16 states", 28, lambda: ours(implementation="triton", state_dtype="bf16")
    yield f"{OURS}: foreach", 36, lambda: ours(implementation="foreach")
    yield f"{OURS}: eager", 36, lambda: ours(implementation="eager")
    yield "AdEMAMix, Apple's loop (reimplemented)", 36, lambda: ApplesLoop(params, lr=1e-6).step
    yield "AdEMAMix, pytorch_optimizer foreach", 36, pytorch_optimizer
    yield "AdEMAMix, bitsandbytes 32-bit", 36, bitsandbytes
    yield "AdamW, torch fused", 28, lambda: adamw(fused=True)
    yield "AdamW, torch foreach", 28, lambda: adamw(foreach=True)


def seconds(function: _Step, repeat: int) -> float:
    """Return the mean time of a call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeat


def measure(shape: str, *, numel: int, rounds: int) -> dict[str, dict[str, object]]:
    """Return for each optimizer the ratios to the copy and its seconds, or why it can't be had."""
    torch.manual_seed(0)
    params: list[torch.Tensor] = [torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in sizes(shape, numel)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    source, target = torch.empty(numel, device=DEVICE), torch.empty(numel, device=DEVICE)
    results: dict[str, dict[str, object]] = {}
    for name, bytes_moved, build in contenders(params):
        try:
            step = build()
            for _ in range(WARM_UP):
                step()
            repeat = max(1, round(0.02 / seconds(step, 3)))
            pairs = []
            for _ in range(rounds):
                copy_s = seconds(lambda: target.copy_(source), 10) * bytes_moved / COPY_BYTES
                pairs.append((seconds(step, repeat), copy_s))
        except Exception as error:  # a peer that is not installed, crashes or does not fit is no end of the others
            results[name] = {"missing": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            continue
        finally:
            step = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()
        low, middle, high = statistics.quantiles([step_s / copy_s for step_s, copy_s in pairs], n=4)
        results[name] = {
            "ratio": middle,
            "quartiles": [low, high],
            "seconds": statistics.median(step_s for step_s, _ in pairs),
            "copy_gb_per_s": numel * bytes_moved / statistics.median(copy_s for _, copy_s in pairs) / 1e9,
        }
    return results


def report(data: dict) -> str:
    """Return the page: machine, table, and what was missing and why."""
    where = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    found = list(data["results"])
    lines = ["| optimizer | " + " | ".join(found) + " |", "|" + "---|" * (len(found) + 1)]
    for name in data["results"][found[0]]:
        cells = []
        for title in found:
            result = data["results"][title][name]
            if "missing" in result:
                cells.append("-")
            else:
                low, high = result["quartiles"]
                share = 100 / result["ratio"]
                cells.append(f"{result['ratio']:.2f} ({low:.2f} to {high:.2f}), {share:.0f} %")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = [(t, n, r["missing"]) for t, rs in data["results"].items() for n, r in rs.items() if "missing" in r]
    missing = "".join(f"\n- {name}, {title}: {reason}" for title, name, reason in reasons)
    return (
        "# One optimizer step on a GPU\n\n"
        "Time of a step over the time of copying, within the device's memory, as many bytes as the optimizer has to "
        "move (36 a parameter for AdEMAMix, 28 for it with bf16 states and for AdamW), measured beside it; then the "
        f"share of the copy rate. Median and quartiles of {data['rounds']} rounds.\n\n"
        f"{where['gpu']}; {versions}.\n\n"
        + "\n".join(lines)
        + "\n"
        + (f"\nNot measured:\n{missing}\n" if missing else "")
    )


def main() -> None:
    """Run everything and write ``results/gpu_optimizer_step.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1_000_000_000, help="of the one tensor")
    parser.add_argument("--tensors-numel", type=int, default=50_000_000, help="of the 300 tensors together")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="without a suffix")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need 2 at least")
    if not torch.cuda.is_available():
        sys.exit(f"{parser.prog}: needs a CUDA device, and torch sees none here")
    data: dict = {"machine": {**machine(), "gpu": torch.cuda.get_device_name()}, "rounds": arguments.rounds}
    data["results"] = {}
    for shape, numel, title in (
        ("flat", arguments.numel, "{:g}M, one tensor"),
        ("tensors", arguments.tensors_numel, "{:g}M in 300 tensors"),
    ):
        data["results"][title.format(numel / 1e6)] = measure(shape, numel=numel, rounds=arguments.rounds)
        torch.cuda.empty_cache()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(report(data))
    print(report(data))


if __name__ == "__main__":
    main()
