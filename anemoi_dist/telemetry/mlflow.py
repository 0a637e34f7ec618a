"""MLflow as a metrics back end."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from anemoi_dist.config.schema import MlflowConfig
from anemoi_dist.config.secrets import redact
from anemoi_dist.config.tree import leaves
from anemoi_dist.errors import PreflightError
from anemoi_dist.process.output import LOSSES
from anemoi_dist.run.directory import RunDirectory, write_atomically

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

#: Without MLflow's own retries, which would keep one request for minutes: what was not sent is sent again anyway.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # Usage statistics for MLflow's makers, sent from compute nodes that often have no route to them.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
#: Seconds between requests; after a failure the pause doubles, up to the second number.
_PAUSE_S, _MAX_PAUSE_S = 5.0, 300.0
#: Seconds that the end of a run waits for what is still to be sent.
_PATIENCE_S = 10.0
#: Points kept for a server that does not answer, about 10 MiB.
_MAX_WAITING = 20_000
#: Limits of MLflow's API, those of the oldest servers in use; config.yaml has the values whole.
_MAX_METRICS, _MAX_PARAMS, _MAX_KEY, _MAX_VALUE = 1000, 100, 250, 500
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}


class MlflowMetrics:
    """Sends metrics, configuration and report to MLflow, from a thread that training never waits for.

    A server that is gone, slow or refuses is one warning. Points are kept for it, up to a limit, and then dropped.

    Parameters
    ----------
    run : RunDirectory
        The run. ``mlflow.json`` in it holds the id of the MLflow run, which a resumed run continues.
    config : MlflowConfig
        Where to send; ``tracking_uri`` is not null.
    say : Callable[[str], None]
        Shows a warning; called by the training thread.

    Raises
    ------
    PreflightError
        MLflow is not installed.
    """

    def __init__(self, run: RunDirectory, config: MlflowConfig, *, say: Callable[[str], None]) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Optional dependency, imported only if the configuration asks for it.
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise PreflightError(
                f"telemetry.mlflow.tracking_uri needs the package mlflow, which cannot be imported here ({error})\n"
                "  fix: pip install 'anemoi-dist[mlflow]', or telemetry.mlflow.tracking_uri=null"
            ) from error
        self._metric, self._param, self._open_client = Metric, Param, MlflowClient
        self._run, self._config, self._say = run, config, say
        self._points: deque[Metric] = deque()
        self._known: dict[str, str] = {}
        self._num_dropped = 0
        self._warning: str | None = None
        self._has_warned = False
        self._state = "running"
        self._closing = threading.Event()
        # A daemon: a request that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Queue one point of every curve in ``values``."""
        self._show_warning()
        if len(self._points) + len(values) > _MAX_WAITING:
            self._num_dropped += len(values)
            return
        now_ms = int(1000 * time.time())
        self._points.extend(self._metric(_key(name), value, now_ms, step) for name, value in values.items())

    def close(self, state: str) -> None:
        """Send what waits, for some seconds at most, and with a finished run its report; say what was lost."""
        if self._closing.is_set():
            return
        self._state = state
        self._closing.set()
        self._thread.join(_PATIENCE_S)
        self._show_warning()
        if lost := self._num_dropped + len(self._points):
            self._say(f"MLflow: {lost} points were not sent")
        elif self._thread.is_alive():
            self._say(f"MLflow has not taken the end of the run within {_PATIENCE_S:.0f} s")

    def _show_warning(self) -> None:
        if self._warning is not None and not self._has_warned:
            self._has_warned = True
            self._say(f"warning: MLflow does not take what this run sends, which trains on: {self._warning}")

    # The thread

    def _work(self) -> None:
        pause_s, mlflow_run = 0.0, None
        while True:
            is_closing = self._closing.wait(pause_s)
            try:
                if mlflow_run is None:
                    mlflow_run = self._open()
                client, run_id = mlflow_run
                self._send_points(client, run_id)
                if is_closing:
                    self._finish(client, run_id)
                pause_s = _PAUSE_S
            except Exception as error:  # whatever a server, a proxy or a plug-in of MLflow does: training goes on
                self._warning = redact(" ".join(str(error).split())[:500])
                pause_s = min(2 * max(pause_s, _PAUSE_S), _MAX_PAUSE_S)
            if is_closing:
                return

    def _open(self) -> tuple[MlflowClient, str]:
        """Return client and id of the MLflow run, new or continued, after sending the configuration."""
        uri, name = str(self._config.tracking_uri), self._config.experiment
        client = self._open_client(uri)
        if not self._known and self._run.mlflow_file.exists():
            self._known = json.loads(self._run.mlflow_file.read_text())
        known = self._known
        if uri not in known:
            found = client.get_experiment_by_name(name)
            experiment_id = client.create_experiment(name) if found is None else found.experiment_id
            run_name = self._config.run_name or self._run.run_id
            known[uri] = client.create_run(experiment_id, run_name=run_name).info.run_id
            try:
                write_atomically(self._run.mlflow_file, json.dumps(known) + "\n")
            except OSError as error:  # kept in memory: every further try would create another MLflow run
                LOSSES.note(str(self._run.mlflow_file), error)
        run_id = known[uri]
        client.update_run(run_id, status="RUNNING")
        text = redact(self._run.config_file.read_text(encoding="utf-8"))
        # MLflow refuses another value for a parameter that it has: those of the first attempt stay.
        present = client.get_run(run_id).data.params
        tree = OmegaConf.to_container(OmegaConf.create(text))
        values = {_key(key): str(value)[:_MAX_VALUE] for key, value in leaves(tree)}
        params = [self._param(key, value) for key, value in values.items() if key not in present]
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
        client.log_text(run_id, text, "config.yaml")
        return client, run_id

    def _send_points(self, client: MlflowClient, run_id: str) -> None:
        while points := list(itertools.islice(self._points, _MAX_METRICS)):
            client.log_batch(run_id, metrics=points)
            for _ in points:  # now: a failure keeps them
                self._points.popleft()

    def _finish(self, client: MlflowClient, run_id: str) -> None:
        report = self._run.report_dir / "index.html"
        if self._state == "finished" and report.exists():
            client.log_artifact(run_id, str(report), "report")
        client.set_terminated(run_id, _STATUS.get(self._state, "KILLED"))


def _key(name: str) -> str:
    """Return a name that MLflow takes."""
    return re.sub(r"[^\w. :/-]", "_", name)[:_MAX_KEY]
