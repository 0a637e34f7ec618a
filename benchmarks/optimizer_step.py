"""What one optimizer step costs on a CPU, beside its peers and beside a plain stream of the same bytes.

    python benchmarks/optimizer_step.py

One process for each shape and number of threads; in it the optimizers take turns, and before each sample a stream of as
many bytes as that optimizer must move is timed (``stream.c``, compiled for this machine). What is reported is the ratio
of the two, which other work on the machine changes little; median, first and last quartile over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "optimizer_step"
PLOT = HERE.parent / "docs" / "optimizer_step.svg"
SHAPES = ("flat", "tensors", "cache")
TITLES = {"flat": "{}, one tensor", "tensors": "{} in 300 tensors", "cache": "{}, one tensor"}
OURS = "AdEMAMix, this package"
#: Seconds that one sample lasts at least, by repetition.
SAMPLE_S = 0.01


class Stream:
    """Times a stream over arrays of its own."""

    def __init__(self, numel: int, *, num_threads: int) -> None:
        library = Path(tempfile.mkdtemp(prefix="stream-")) / "stream.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, str(HERE / "stream.c"), "-o", str(library)], check=True)
        self._function = ctypes.CDLL(str(library)).stream
        self._arrays = [torch.zeros(numel) for _ in range(5)]
        self._pointers = [ctypes.c_void_p(a.data_ptr()) for a in self._arrays]
        self._numel, self._num_threads = numel, num_threads

    def run(self, num_written: int) -> None:
        """Move ``4 * (2 * num_written + 1)`` bytes for each element."""
        self._function(*self._pointers, ctypes.c_int64(self._numel), num_written, self._num_threads)


@dataclass(frozen=True)
class Contender:
    """One optimizer's step, and the stream that it is held against.

    Attributes
    ----------
    step : Callable[[], object]
        Does one update.
    num_written : int
        Arrays of floats that the stream reads and writes; it reads one more.
    share : float
        Bytes that the optimizer has to move, of those that the stream moves.
    """

    step: Callable[[], object]
    num_written: int
    share: float = 1.0

    @property
    def bytes_moved(self) -> float:
        """For each element."""
        return 4 * (2 * self.num_written + 1) * self.share


class ApplesLoop(torch.optim.Optimizer):
    """AdEMAMix as Apple's code spells it, written anew from the paper's equations: a loop, an operation at a time."""

    def __init__(self, params: list[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999, 0.9999), "alpha": 2.0, "eps": 1e-8, "decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Do one update."""
        for group in self.param_groups:
            beta1, beta2, beta3 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m1=torch.zeros_like(p), m2=torch.zeros_like(p), nu=torch.zeros_like(p))
                state["step"] += 1
                m1, m2, nu = state["m1"], state["m2"], state["nu"]
                m1.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                m2.mul_(beta3).add_(p.grad, alpha=1 - beta3)
                nu.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (nu.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
                update = (m1.div(1 - beta1 ** state["step"]) + group["alpha"] * m2) / denominator
                update.add_(p, alpha=group["decay"])
                p.add_(-group["lr"] * update)


def sizes(shape: str, numel: int) -> list[int]:
    """Return the sizes of the tensors: one, or 300 as a network has them, matrices with small vectors between."""
    if shape != "tensors":
        return [numel]
    small = [max(1, numel // 50_000)] * 150
    large = [max(1, 2 * (index + 1)) for index in range(150)]
    left = numel - sum(small)
    large = [left * weight // sum(large) for weight in large]
    large[-1] += left - sum(large)
    return [size for pair in zip(small, large, strict=True) for size in pair]


def contenders(params: list[torch.Tensor]) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yield names and what builds them; what can't be had here raises."""
    from anemoi_dist.optimizers import AdEMAMix

    options = {"lr": 1e-6, "weight_decay": 0.01}

    def ours(num_written: int = 4, share: float = 1.0, **more: object) -> Contender:
        return Contender(AdEMAMix(params, **options, **more).step, num_written, share)  # type: ignore[arg-type]

    def clipped() -> Contender:
        from anemoi_dist.optimizers.norm import squared_norms

        optimizer = AdEMAMix(params, **options)

        def step() -> None:
            norm = squared_norms([p.grad for p in params]).sum().sqrt().float()
            optimizer.grad_scale = (norm / 1e-3).clamp(min=1.0)
            optimizer.step()

        return Contender(step, 4)

    def clipped_apart() -> Contender:
        optimizer = AdEMAMix(params, **options)

        def step() -> None:
            # The limit lies just below the norm: the pass is made, the gradients stay what they are.
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            torch.nn.utils.clip_grads_with_norm_(params, float(norm) * (1 - 1e-7), norm)
            optimizer.step()

        return Contender(step, 4)

    def narrow() -> Contender:
        from anemoi_dist.optimizers import native
        from anemoi_dist.optimizers.update import ParamTensors, host_scalars

        group = AdEMAMix(params, **options).param_groups[0]
        rows = []
        for p in params:
            low = torch.zeros(p.numel(), dtype=torch.bfloat16)
            states = [torch.zeros_like(p) for _ in range(3)]
            rows.append(ParamTensors(p, p.grad.bfloat16(), *states, low))
        return Contender(lambda: native.update(rows, host_scalars(group, 10)), 4)

    def apple() -> Contender:
        return Contender(ApplesLoop(params, lr=1e-6).step, 4)

    def pytorch_optimizer() -> Contender:
        import pytorch_optimizer as peer

        return Contender(peer.AdEMAMix(params, lr=1e-6, weight_decay=0.01, weight_decouple=True, foreach=True).step, 4)

    def bitsandbytes() -> Contender:
        import bitsandbytes as peer

        return Contender(peer.optim.AdEMAMix(params, lr=1e-6).step, 4)

    def deepspeed() -> Contender:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return Contender(DeepSpeedCPUAdam(params, **options).step, 3)

    def adamw(**more: object) -> Contender:
        return Contender(torch.optim.AdamW(params, **options, **more).step, 3)  # type: ignore[arg-type]

    yield f"{OURS}: c", lambda: ours(implementation="c")
    yield f"{OURS}: c, bf16 gradient in, bf16 copy out", narrow
    # Read 16 and written 12, as by the stream of three arrays; with all three averages read 14 and written 10.
    yield f"{OURS}: c, bf16 states", lambda: ours(3, implementation="c", state_dtype="bf16")
    every = dict.fromkeys(("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"), "bf16")
    yield f"{OURS}: c, bf16 states, the slow one too", lambda: ours(3, 24 / 28, implementation="c", state_dtype=every)
    yield f"{OURS}: c, norm and clipping in the update", clipped
    yield f"{OURS}: c, norm and clipping in passes before", clipped_apart
    yield f"{OURS}: eager", lambda: ours(implementation="eager")
    yield f"{OURS}: foreach", lambda: ours(implementation="foreach")
    yield "AdEMAMix, Apple's loop (reimplemented)", apple
    yield "AdEMAMix, pytorch_optimizer foreach", pytorch_optimizer
    yield "AdEMAMix, bitsandbytes 32-bit", bitsandbytes
    yield "AdamW, torch fused", lambda: adamw(fused=True)
    yield "AdamW, torch foreach", lambda: adamw(foreach=True)
    yield "AdamW, DeepSpeed CPUAdam", deepspeed


def seconds(function: Callable[[], object], repeat: int) -> float:
    """Return the mean time of a call."""
    begin = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - begin) / repeat


def measure(shape: str, *, numel: int, num_threads: int, rounds: int) -> dict[str, object]:
    """Return for each optimizer the ratios to its stream and its seconds, or why it can't be had."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes(shape, numel)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    stream = Stream(numel, num_threads=num_threads)
    built: dict[str, Contender] = {}
    results: dict[str, dict[str, object]] = {}
    for name, build in contenders(params):
        try:
            built[name] = build()
            built[name].step()
            built[name].step()
        except Exception as error:
            built.pop(name, None)
            results[name] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
    repeats = {n: max(1, round(SAMPLE_S / seconds(c.step, 1))) for n, c in built.items()}
    for _ in range(rounds):
        for name, contender in built.items():
            written = contender.num_written
            stream_repeat = max(1, round(SAMPLE_S / seconds(lambda w=written: stream.run(w), 1)))
            beside = seconds(lambda w=written: stream.run(w), stream_repeat) * contender.share
            samples[name].append((seconds(contender.step, repeats[name]), beside))
    for name, pairs in samples.items():
        ratios = [step / beside for step, beside in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        moved = numel * built[name].bytes_moved
        results[name] = {
            "ratio": middle,
            "quartiles": [low, high],
            "seconds": statistics.median(step for step, _ in pairs),
            "stream_gb_per_s": moved / statistics.median(stream for _, stream in pairs) / 1e9,
        }
    return {name: results[name] for name, _ in contenders(params)}


def machine() -> dict[str, object]:
    """Describe where it ran."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    versions = {}
    for package in ("torch", "deepspeed", "pytorch_optimizer", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": versions}


def columns(data: dict) -> list[tuple[str, str]]:
    """Return the measured columns in order, as (key, heading)."""
    return [
        (key, f"{TITLES[shape].format(data['numel'][shape])}, {threads} thread{'s' if threads > 1 else ''}")
        for shape in SHAPES
        for threads in (1, 2)
        if (key := f"{shape}-{threads}") in data["results"]
    ]


def table(data: dict) -> str:
    """Return the result as Markdown."""
    found = columns(data)
    lines = ["| optimizer | " + " | ".join(title for _, title in found) + " |", "|" + "---|" * (len(found) + 1)]
    for name in data["results"][found[0][0]]:
        cells = []
        for key, _ in found:
            result = data["results"][key][name]
            if "missing" in result:
                cells.append("-")
            else:
                low, high = result["quartiles"]
                cells.append(f"{result['ratio']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(data: dict) -> str:
    """Return the page: machine, table, and what was missing and why."""
    where = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    reasons = {n: r["missing"] for results in data["results"].values() for n, r in results.items() if "missing" in r}
    missing = "".join(f"\n- {name}: {reason}" for name, reason in reasons.items())
    return (
        "# One optimizer step on a CPU\n\n"
        "Time of a step over the time of a plain stream of the bytes that the optimizer has to move (36 a parameter "
        "for AdEMAMix, 28 for it with bf16 states and for AdamW, 24 with the slow one too), measured beside it. Median "
        f"and quartiles of "
        f"{data['rounds']} rounds.\n\n"
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} at the start; {versions}.\n\n"
        f"{table(data)}\n" + (f"\nNot measured:\n{missing}\n" if missing else "")
    )


def plot(data: dict, path: Path) -> None:
    """Draw the first column, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # Letters stay letters, and the same figures give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "optimizer_step", "svg.fonttype": "none"}
    key, title = columns(data)[0]
    rows = {n: r for n, r in reversed(data["results"][key].items()) if "missing" not in r}
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(rows) + 1.2), layout="constrained")
    middle = [r["ratio"] for r in rows.values()]
    low = [r["ratio"] - r["quartiles"][0] for r in rows.values()]
    high = [r["quartiles"][1] - r["ratio"] for r in rows.values()]
    axes.barh(
        list(rows), middle, xerr=[low, high], color=["#1f6f8b" if n.startswith(OURS) else "#b9c4c9" for n in rows]
    )
    for index, value in enumerate(middle):
        axes.text(value * 1.06, index, f"{value:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time of a step / time of a stream of its bytes", title=title)
    axes.set_xlim(0.7, max(middle) * 1.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def write(data: dict, output: Path, *, picture: Path) -> None:
    """Write what has been measured so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    output.with_suffix(".md").write_text(report(data))
    plot(data, picture)


def main() -> None:
    """Run everything and write ``results/optimizer_step.{md,json}`` and the plot of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--cache-numel", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=SHAPES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="without a suffix")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        shape, num_threads = arguments.one[0], int(arguments.one[1])
        numel = arguments.cache_numel if shape == "cache" else arguments.numel
        results = measure(shape, numel=numel, num_threads=num_threads, rounds=arguments.rounds)
        arguments.output.write_text(json.dumps(results))
        return
    numel = {s: arguments.cache_numel if s == "cache" else arguments.numel for s in arguments.shapes}
    numel = {s: f"{n / 1e6:g}M" for s, n in numel.items()}
    data: dict = {"machine": machine(), "rounds": arguments.rounds, "numel": numel, "results": {}}
    for threads in arguments.threads:
        for shape in arguments.shapes:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "result.json"
                # The number of threads of some peers is fixed when their OpenMP starts: a process for each.
                environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
                options = ["--numel", arguments.numel, "--cache-numel", arguments.cache_numel]
                options += ["--rounds", arguments.rounds, "--output", output, "--one", shape, threads]
                subprocess.run([sys.executable, __file__, *map(str, options)], env=environment, check=True)
                data["results"][f"{shape}-{threads}"] = json.loads(output.read_text())
            write(data, arguments.output, picture=arguments.plot)
    print(report(data))


if __name__ == "__main__":
    main()
