"""MLflow: what arrives in a folder and on a real server, and what happens where nobody answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import command, finish, start, wait_for_checkpoint, wait_for_step
from support.waiting import wait_until

from anemoi_dist.config.compose import compose
from anemoi_dist.config.parse import to_yaml
from anemoi_dist.config.schema import MlflowConfig
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry import mlflow

pytest.importorskip("mlflow")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create()
    secret = ["+data.options.storage=https://me:secret@host/x", "+data.options.long=" + 700 * "x"]
    run.config_file.write_text(to_yaml(compose(["run.id=run", *secret]).config))
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def runs_at(uri: str):
    """Return a client, and the MLflow runs of the default experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("anemoi-dist")
    return client, client.search_runs([experiment.experiment_id])


def artifacts_of(client, run_id: str, where: str = "") -> set[str]:
    return {file.path for file in client.list_artifacts(run_id, where)}


def test_a_resumed_run_continues_its_mlflow_run(run: RunDirectory, folder: str, tmp_path: Path) -> None:
    said: list[str] = []
    first = mlflow.MlflowMetrics(run, MlflowConfig(folder), say=said.append)
    first.write({"training/loss": 0.5, "validation/rmse/msl/6 h": 127.5}, step=10)
    first.close("preempted")
    first.close("failed")
    client, (found,) = runs_at(folder)
    assert (found.info.run_name, found.info.status) == ("run", "KILLED")
    run.config_file.write_text(run.config_file.read_text().replace("max_steps: 300", "max_steps: 600"))
    (run.report_dir / "index.html").write_text("<html>")
    second = mlflow.MlflowMetrics(run, MlflowConfig(folder, run_name="other"), say=said.append)
    second.write({"training/loss": 0.25}, step=20)
    second.close("finished")
    client, (found,) = runs_at(folder)
    run_id = found.info.run_id
    assert not said and found.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "training/loss")] == [(10, 0.5), (20, 0.25)]
    assert found.data.metrics["validation/rmse/msl/6 h"] == 127.5
    assert found.data.params["training.max_steps"] == "300", "MLflow never changes a parameter"
    assert found.data.params["data.options.storage"] == "https://***@host/x"
    assert len(found.data.params["data.options.long"]) == 500
    assert artifacts_of(client, run_id) == {"config.yaml", "report"}
    assert artifacts_of(client, run_id, "report") == {"report/index.html"}
    sent = Path(client.download_artifacts(run_id, "config.yaml", str(tmp_path))).read_text()
    assert "max_steps: 600" in sent and "secret" not in sent and 700 * "x" in sent


def test_a_server_that_is_gone_is_one_warning(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "_MAX_WAITING", 10)
    said: list[str] = []
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        writer = mlflow.MlflowMetrics(run, MlflowConfig(f"http://127.0.0.1:{closed.getsockname()[1]}"), say=said.append)
        for step in range(1, 21):
            writer.write({"loss": 1.0}, step=step)
        assert wait_until(lambda: writer._warning is not None)
        for step in range(21, 24):
            writer.write({"loss": 1.0}, step=step)
        writer.close("failed")
    warning, lost = said
    assert "which trains on" in warning and "127.0.0.1" in warning
    assert lost == "MLflow: 23 points were not sent"


def test_a_server_that_never_answers_holds_up_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "_PATIENCE_S", 0.1)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        writer = mlflow.MlflowMetrics(run, MlflowConfig(uri), say=said.append)
        writer.write({"loss": 1.0}, step=1)
        writer.close("finished")
        assert writer._thread.is_alive() and writer._thread.daemon
    assert said == ["MLflow: 1 points were not sent"]


def test_points_wait_for_a_server_that_comes_back(
    run: RunDirectory, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "_PAUSE_S", 0.01)
    (tmp_path / "store").write_text("in the way")
    said: list[str] = []
    writer = mlflow.MlflowMetrics(run, MlflowConfig(folder), say=said.append)
    writer.write({"loss": 1.0}, step=1)
    while writer._warning is None:
        time.sleep(0.01)
    (tmp_path / "store").unlink()
    writer.close("finished")
    _, (found,) = runs_at(folder)
    assert found.data.metrics == {"loss": 1.0} and len(said) == 1


def test_a_missing_package_is_named_with_the_fix(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(PreflightError, match=r"pip install 'anemoi-dist\[mlflow\]'"):
        mlflow.MlflowMetrics(run, MlflowConfig("http://host"), say=print)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("telemetry.mlflow.tracking_uri='https://me:secret@host'", "must hold no password"),
        ("telemetry.mlflow.run_name=a", "has no effect"),
    ],
)
def test_wrong_configurations(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose([override])
    assert "secret" not in str(caught.value)


def test_the_group_takes_the_variable_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert compose(["telemetry=mlflow"]).config.telemetry.mlflow.tracking_uri == "http://host"
    assert compose(["telemetry=mlflow"]).config.run.id == compose([]).config.run.id, "the same run, watched elsewhere"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Start a real server on SQLite."""
    pytest.importorskip("flask_cors", reason="no MLflow server: pip install -c constraints.txt 'anemoi-dist[test]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    words += [f"--backend-store-uri=sqlite:///{tmp_path}/mlflow.db", f"--artifacts-destination={tmp_path}/artifacts"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=output, env={**os.environ, **quiet}, start_new_session=True
        )
    try:
        assert wait_until(lambda: "startup complete" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_is_one_run_of_a_real_server(server: str, tmp_path: Path) -> None:
    train = command(tmp_path, "a", f"telemetry.mlflow.tracking_uri={server}", "launcher.ranks=2")
    process = start(train, MLFLOW_TRACKING_USERNAME="me", MLFLOW_TRACKING_PASSWORD="s3cr3t-word")
    wait_for_checkpoint(tmp_path / "a", process)
    wait_for_step(tmp_path / "a", 12, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 75, output
    code, output = finish(start(train))
    assert code == 0 and "MLflow" not in output, output
    client, (found,) = runs_at(server)
    assert (found.info.run_name, found.info.status) == ("a", "FINISHED")
    steps = {metric.step for metric in client.get_metric_history(found.info.run_id, "training/loss")}
    assert steps == set(range(1, 41))
    assert found.data.params["training.max_steps"] == "40"
    assert artifacts_of(client, found.info.run_id) == {"config.yaml", "report"}
    assert not any(b"s3cr3t-word" in file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file())
