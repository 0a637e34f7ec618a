"""``anemoi-dist plan``: what it shows of a plan, of memory and of what it cannot know."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from anemoi_dist.config.compose import compose
from anemoi_dist.config.engines import ENGINES
from anemoi_dist.engines.memory_estimate import NOT_COUNTED, ExpectedMemory, ModelSize, Parameter, expected_memory
from anemoi_dist.errors import ConfigError
from anemoi_dist.launch import cli
from anemoi_dist.launch.commands import plan as planning
from anemoi_dist.launch.launchers import machine, model_size
from anemoi_dist.launch.launchers.base import Machine, plan
from anemoi_dist.launch.launchers.memory_table import WORLD_SIZES, memory_table
from anemoi_dist.launch.launchers.model_size import UnknownSizeError
from anemoi_dist.optimizers import gpu
from anemoi_dist.preflight import model_size as measured
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.progress import format_bytes

ROOT = Path(__file__).parents[3]
GIB = 1024**3
BILLION = ["--num-parameters", "1e9"]
TWO_RANKS = ["launcher.ranks=2", "run.id=x"]


@pytest.fixture(autouse=True)
def _in_an_empty_directory_without_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "device_memory_bytes", lambda: None)


@pytest.fixture
def _unknown_model(monkeypatch):
    def unknown(config):
        raise UnknownSizeError("no torch today")

    monkeypatch.setattr(planning, "model_size", unknown)


def shown(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not Path("runs").exists()
    return out


def memory_of(engine: str) -> ExpectedMemory:
    """Return what a plan of a billion parameters on two ranks has to show."""
    return expected_memory(compose([*TWO_RANKS, engine]).config, ModelSize([Parameter((10**9,))]), world_size=2)


# The plan


def test_a_plan_with_its_memory(capsys):
    text = shown(capsys, *BILLION, *TWO_RANKS, "engine=zero1", "--device-memory-gib", "40")
    assert f"run         x in {Path('runs/x').absolute()}\n" in text
    assert "launcher    local: 1 node x 2 ranks\n" in text
    assert "batch       8 samples a step = 2 ranks x 1 micro-batch x 4\n" in text
    memory = memory_of("engine=zero1")
    lines = dict(re.findall(r"^  (\S.*?) {2,}(\S+ \S+)  (?:device|host)$", text, re.MULTILINE))
    assert lines["parameters"] == "3.7 GiB" == format_bytes(memory.parameters)
    assert lines["exp_avg_slow"] == "1.9 GiB" == format_bytes(memory.states["exp_avg_slow"])
    assert lines["checkpoint staging"] == "7.5 GiB" == format_bytes(memory.staging)
    assert lines["gradients"] == format_bytes(memory.gradients)
    share = memory.device / (40 * GIB)
    assert f"  sum {format_bytes(memory.device):>28}  device, {share:.0%} of 40.0 GiB\n" in text
    assert f"not counted: {NOT_COUNTED}\n" in text
    assert "unknown" not in text
    assert "  OMP_NUM_THREADS=" in text or "OMP_NUM_THREADS" in planning.detect_machine().environ
    assert text.endswith(f"-m anemoi_dist.train --run-directory {Path('runs/x').absolute()}\n")


def test_what_does_not_fit_is_said(capsys):
    arguments = [*BILLION, *TWO_RANKS, "engine=zero1"]
    device_gib = memory_of("engine=zero1").device / GIB
    assert "DOES NOT FIT" not in shown(capsys, *arguments, "--device-memory-gib", str(device_gib * 1.02))
    text = shown(capsys, *arguments, "--device-memory-gib", str(device_gib / 1.02))
    assert re.search(r" 102% of \S+ GiB  DOES NOT FIT\n", text)


def test_what_is_offloaded_lies_on_the_host(capsys):
    text = shown(capsys, *BILLION, *TWO_RANKS, "engine=zero3_offload")
    assert re.search(r"fp32 masters +1\.9 GiB  host\n", text)
    assert re.search(r"sum +3\.7 GiB  device\n", text)
    assert re.search(r"sum +18\.6 GiB  host, 37\.3 GiB a node\n", text)


@pytest.mark.usefixtures("_unknown_model")
def test_an_unknown_size_is_no_failure(capsys):
    text = shown(capsys, *TWO_RANKS)
    assert "  unknown: the size of the model: no torch today\n" in text
    assert "memory of the fullest rank" not in text
    assert cli.main(["train", "--dry-run", *TWO_RANKS]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["plan", "--sweep"]) == 3
    assert "no torch today\n  fix: --num-parameters N" in capsys.readouterr().err


def test_the_engine_is_shown_with_its_overlap(capsys):
    assert "engine      zero1, overlap, fp32\n" in shown(
        capsys, *BILLION, *TWO_RANKS, "engine=zero1", "engine.overlap=true"
    )
    assert "engine      zero1, fp32\n" in shown(capsys, *BILLION, *TWO_RANKS, "engine=zero1")


def test_a_plan_for_mpirun_needs_none(capsys, monkeypatch):
    monkeypatch.setattr(machine, "find_mpirun", lambda *_, **__: None)
    text = shown(capsys, *BILLION, *TWO_RANKS, "launcher=mpi")
    assert "note        there is no mpirun in PATH" in text
    assert " mpirun -n 2 --map-by" in text.splitlines()[-1]


def test_an_unknown_optimizer_is_said(capsys):
    Path("mine.yaml").write_text("training: {optimizer: {_target_: mine.Sophia}}\n")
    text = shown(capsys, *BILLION, *TWO_RANKS, "--config", "mine.yaml")
    assert "  unknown: the states of mine.Sophia\n" in text
    assert "gradients" in text


def test_a_script_is_shown():
    composed = compose([*TWO_RANKS])
    run = RunDirectory(Path("/runs/x"))
    planned = plan(composed.config, run, Machine(num_gpus=0, environ={}, python="python"))
    planned = dataclasses.replace(planned, script="#!/bin/bash\n\nsrun true\n")
    lines = list(planning._plan_lines(composed.config, run, planned, planning.Sizes(None, "why", None)))
    assert lines[lines.index("script") + 1 : lines.index("script") + 4] == ["  #!/bin/bash", "", "  srun true"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-parameters", "many"],
        ["--num-parameters", "-3"],
        ["--num-parameters", "1.5"],
        ["--num-parameters", "inf"],
        ["--device-memory-gib", "0", *BILLION],
        ["--device-memory-gib", "nan", *BILLION],
        ["launcher.ranks=3", *BILLION],
        ["engine=zero4"],
        ["trainin.max_steps=3"],
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments, capsys):
    assert cli.main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("anemoi-dist: ") == 1
    assert "Traceback" not in err


# JSON


def test_json_says_what_the_text_says(capsys):
    found = json.loads(shown(capsys, *BILLION, *TWO_RANKS, "engine=zero1", "--device-memory-gib", "40", "--json"))
    memory = memory_of("engine=zero1")
    assert found["memory"]["device"] == memory.device
    assert found["memory"]["states"] == memory.states
    assert found["device_share"] == memory.device / (40 * GIB)
    assert found["world_size"] == found["nodes"] * found["ranks_per_node"] == 2
    assert found["unknown"] == []
    assert found["shell"].endswith(found["command"][-1])
    described(found)


def test_json_of_a_sweep(capsys):
    found = json.loads(shown(capsys, *BILLION, "--sweep", "--json", "training.global_batch_size=12"))
    assert len(found["sweep"]) == len(ENGINES) * len(WORLD_SIZES)
    problems = {cell["world_size"]: cell["batch_problem"] for cell in found["sweep"]}
    assert problems[4] is None
    assert "multiple of the 8 ranks" in problems[8]
    assert {cell["fits"] for cell in found["sweep"]} == {None}
    described(found)
    described(found["sweep"][0])


def described(found: dict) -> None:
    text = (ROOT / "docs/reference/commands.rst").read_text(encoding="utf-8")
    for key in found:
        assert f"``{key}``" in text, key


# The table


def test_the_table_marks_what_does_not_fit_and_does_not_divide(capsys):
    text = shown(capsys, "--sweep", *BILLION, "--device-memory-gib", "16", "training.global_batch_size=16")
    header = next(line for line in text.splitlines() if line.startswith("   ranks"))
    assert header.split() == ["ranks", *ENGINES]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if re.match(r" *\d+[* ] ", line)}
    assert rows["1"][0] == rows["16"][0] == "22.35!"
    assert rows["16"][3].endswith("!") is False
    assert [name for name in rows if name.endswith("*")] == [f"{n}*" for n in WORLD_SIZES if n > 16]
    assert "! does not fit into 16.0 GiB\n" in text
    assert "* the batch cannot be cut over so many: training.global_batch_size=16 must be a multiple of the 32" in text


def test_the_table_keeps_the_options_of_deepspeed():
    options = {"zero_optimization": {"reduce_bucket_size": 1000}}
    config = compose(["engine=zero2", "run.id=x"]).config
    config.engine.options = options
    first = memory_table(config, ModelSize([Parameter((10,))]))[0]
    buckets = {engine: memory.communication for engine, memory in first.memory.items()}
    assert buckets == {"ddp": 40, "zero0": 40, **dict.fromkeys(("zero1", "zero2", "zero3", "zero3_offload"), 4000)} | {
        "fsdp2": 0
    }


def test_a_billion_parameters_take_neither_torch_nor_a_process():
    code = (
        "import subprocess, sys\nfrom anemoi_dist.launch.cli import main\n"
        "def refuse(*words, **more):\n    raise AssertionError(words)\n"
        "subprocess.Popen = refuse\n"
        "assert main(['plan', '--num-parameters', '1e9', '--sweep', '--device-memory-gib', '40']) == 0\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# The size of the model


class Stubborn(nn.Module):
    """It looks at values while it is built, which the meta device has none of, and it talks."""

    def __init__(self) -> None:
        super().__init__()
        print("building")
        width = int(torch.linspace(2, 7, 3)[-1])
        self.layer = nn.Linear(width, 3)
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)


def test_the_size_of_a_model(monkeypatch):
    config = compose(["data=synthetic", "run.id=x"]).config
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    config.model = {"_target_": "test_plan.Stubborn"}
    config.security.allowed_targets = ["test_plan"]
    size = model_size.model_size(config)
    assert size.parameters == [Parameter((5,), False), Parameter((3, 7)), Parameter((3,))]
    assert size.largest_layer == ("model.layer", 24)
    assert size.buffer_bytes > 0


def test_the_default_model_is_measured_without_memory(monkeypatch):
    built = []
    original = measured._build
    monkeypatch.setattr(measured, "_build", lambda *given: built.append(original(*given)) or built[-1])
    found = measured.measure(compose(["run.id=x"]).config)
    assert {parameter.device.type for parameter in built[0].parameters()} == {"meta"}
    assert found.num_parameters == 99_393


def test_why_a_size_is_unknown(tmp_path, monkeypatch):
    config = compose(["data.dataset=/nowhere.zarr", "run.id=x"]).config
    with pytest.raises(UnknownSizeError, match=r"more than 0.01 s"):
        model_size.model_size(config, timeout_s=0.01)
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnknownSizeError, match="No module named 'torch'"):
        model_size.model_size(config)


@pytest.mark.usefixtures("measured_here")
def test_a_dataset_that_is_not_here_leaves_a_size_unknown():
    config = compose(["data.dataset=/nowhere.zarr", "run.id=x"]).config
    with pytest.raises(UnknownSizeError, match=r"data.dataset='/nowhere.zarr': cannot be opened"):
        model_size.model_size(config)


@pytest.mark.usefixtures("measured_here")
def test_a_model_that_cannot_be_built_anywhere_is_refused(capsys):
    assert cli.main(["plan", "model.dilations=[0]", *TWO_RANKS]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("anemoi-dist: model.dilations=[0]: must hold numbers from 1 to")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.optimizer.betas=[0.9,0.999,1.0]", "training.optimizer.betas=.*must each lie in"),
        ("+training.optimizer.alfa=3", "training.optimizer='alfa': is no argument of AdEMAMix"),
        ("+training.scheduler.warmup=3", "training.scheduler='warmup': is no argument of"),
    ],
)
@pytest.mark.usefixtures("measured_here")
def test_what_the_optimizer_of_every_rank_would_refuse_is_refused(override, said):
    config = compose([override, "run.id=x"]).config
    with pytest.raises(ConfigError, match=said):
        model_size.model_size(config)


def test_an_optimizer_that_this_machine_alone_can_not_have_is_no_reason(monkeypatch):
    config = compose(["run.id=x"]).config
    fused = {"_target_": "torch.optim.AdamW", "fused": True}
    config.training.optimizer, unfused = fused, config.training.optimizer
    assert measured.measure(config).parameters, "no fused step for parameters without memory"
    config.training.optimizer = {**unfused, "implementation": "triton"}
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
    assert measured.measure(config).parameters
    config.security.allowed_targets = [__name__, "not_installed_here"]
    for name in (f"{__name__}.NeedsGpu", "not_installed_here.Optimizer"):
        config.training.optimizer = {"_target_": name}
        assert measured.measure(config).parameters


class NeedsGpu(torch.optim.SGD):
    """As some fused optimizers do, it allocates when it is built, and not where its parameters are."""

    def __init__(self, params, lr):
        raise AssertionError("Torch not compiled with CUDA enabled")


def test_the_memory_of_the_device(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert planning.device_memory_bytes() is None
    tool = tmp_path / "nvidia-smi"
    for answer, expected in (("81559\\n40960\\n", 40960 * 1024**2), ("[N/A]\\n", None), ("", None)):
        tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        tool.chmod(0o755)
        assert planning.device_memory_bytes() == expected
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert planning.device_memory_bytes() is None
