"""Setup of one attempt on one rank: from the frozen configuration to the trainer, and on to the end of training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from anemoi_dist.checkpoint.initial import find_initial
from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.matching import WeightsOnly
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Saver
from anemoi_dist.checkpoint.select import Selection, select
from anemoi_dist.checkpoint.store import open_store
from anemoi_dist.config.batch import BatchPlan, plan_batches
from anemoi_dist.config.schema import Config
from anemoi_dist.data.loader import BatchLoader, build_loader
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler
from anemoi_dist.distributed.control_word import StopRequest
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.base import Engine, MemoryReport
from anemoi_dist.engines.registry import check_state, create_engine
from anemoi_dist.errors import AnemoiDistError, ExitCode
from anemoi_dist.optimizers.learning_rate import scaled_rate
from anemoi_dist.run.attempt import end_state
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.versions import installed_versions
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.base import Start, Task, freeze
from anemoi_dist.tasks.rehearsal import rehearse
from anemoi_dist.telemetry.heartbeat import beat
from anemoi_dist.telemetry.progress import format_bytes
from anemoi_dist.training.recorder import Recorder
from anemoi_dist.training.trainer import Trainer

_PACKAGES = ("anemoi-dist", "torch", "deepspeed", "timm", "hydra-core", "anemoi-datasets", "numpy", "safetensors")


def train(config: Config, *, run: RunDirectory, world: World, attempt: int) -> None:
    """Train a run to its end on this rank. Collective.

    Raises
    ------
    AnemoiDistError
        The run ended in a way that has its own exit code.
    """
    stop = StopRequest(run, is_main=world.is_main)
    stop.listen()  # first: a scheduler may send its signal while the data are being opened
    world.extend_collective_timeouts(config.watchdog.longest_s)
    store = open_store(run, config.checkpoint.url)
    selection = select(store, world=world, strict=config.checkpoint.strict)
    first_step = selection.checkpoint.manifest.step if selection.checkpoint else 0
    recorder = Recorder(run, config, is_main=world.is_main, first_step=first_step)
    plan = plan_batches(config, world_size=world.world_size)
    code, trainer, loader = ExitCode.INTERNAL, None, None
    try:
        _report_passed_over(selection, recorder)
        with recorder.phase("startup"):
            task = _open_task(config, recorder)
            recorder.message("building model and optimizer")
            origin = _origin(config)
            saver = Saver(store, world=world, config=config.checkpoint, origin=origin, broken=selection.passed_over)
            engine, start = _create_engine(task, config, world, is_new=selection.checkpoint is None)
            trainer = Trainer(
                config=config,
                world=world,
                engine=engine,
                task=task,
                saver=saver,
                recorder=recorder,
                stop=stop,
            )
            _set_out(trainer, start, selection.checkpoint)
            _announce(trainer, run=run, attempt=attempt, selection=selection, plan=plan, origin=origin)
            # Last: its workers read ahead from the step that the trainer continues with.
            loader = _start_loader(trainer, plan)
        trainer.fit(loader)
        with recorder.phase("validation"), trainer.engine.averaged_weights():
            notes = task.export(run, evaluate=trainer.engine.evaluate, world=world)
        for note in notes:
            recorder.message(note)
        recorder.message(f"finished; for figures and maps: anemoi-dist report {run.path}")
        code = ExitCode.FINISHED
    except AnemoiDistError as error:
        code = error.exit_code
        raise
    finally:
        # Nothing here is a collective: after a failure the other ranks may be anywhere.
        step = trainer.progress.step if trainer else first_step
        state = end_state(code)
        recorder.event("end", step=step, state=state, exit_code=int(code), seconds=recorder.seconds())
        if code == ExitCode.FINISHED and world.is_main and config.telemetry.mlflow.tracking_uri is not None:
            _write_report(run, recorder)
        recorder.close(state)
        if loader is not None:
            loader.close()
    # On success alone: closing an engine may communicate.
    trainer.engine.close()


def _report_passed_over(selection: Selection, recorder: Recorder) -> None:
    for step, reason in selection.passed_over.items():
        recorder.event("passed_over", step=step, reason=reason)
        recorder.message(f"checkpoint of step {step} is passed over: {reason}")


def _write_report(run: RunDirectory, recorder: Recorder) -> None:
    # Imported here: drawing needs the extra ``report``, and only a run that sends its report draws it.
    from anemoi_dist.report.page import write_report

    try:
        write_report(run)
    except Exception as error:  # the run is finished, whatever is wrong with its page
        recorder.message(f"note: MLflow gets no report: {error}")


def _open_task(config: Config, recorder: Recorder) -> Task:
    recorder.message("opening the data")
    task = create_task(config)
    for warning in task.warnings():
        recorder.message(warning)
    return task


def _create_engine(task: Task, config: Config, world: World, *, is_new: bool) -> tuple[Engine, Start]:
    """Build module and engine; return with it what a run that ``is_new`` begins with."""
    torch.manual_seed(config.run.seed)  # the same initial parameters on every rank
    # Each of these may take long for a large model; the watchdog must not take them together for a hang.
    beat()
    module = task.create_module(world_size=world.world_size // config.task.groups.sample)
    freeze(module, config.training.freeze)
    start = task.load_initial(module) if is_new else Start()
    check_state(module)
    rehearse(task, module, config, device=world.device)
    beat()
    engine = create_engine(module, config=config, world=world)
    beat()
    world.extend_collective_timeouts(config.watchdog.longest_s)  # again: engines create process groups of their own
    return engine, start


def _set_out(trainer: Trainer, start: Start, checkpoint: Checkpoint | None) -> None:
    """Continue from the run's own checkpoint, or begin with what task and configuration name. Collective."""
    if checkpoint is not None:
        _resume(trainer, checkpoint)
        return
    for note in start.notes:
        trainer.recorder.message(note)
    if start.source is not None:
        trainer.begin(start, start.source)
    if (name := trainer.config.checkpoint.init_from) is not None:
        _begin_from(trainer, name)


def _resume(trainer: Trainer, checkpoint: Checkpoint) -> None:
    step, shared_by = checkpoint.manifest.step, trainer.config.task.groups.sample
    was, now = checkpoint.manifest.world_size // shared_by, trainer.world.world_size // shared_by
    _note_scaled_rate(trainer.config, trainer.recorder, step=step, was=was, now=now)
    trainer.resume(checkpoint)
    checkpoint.close()


def _begin_from(trainer: Trainer, name: str) -> None:
    config, world = trainer.config, trainer.world
    # Rank 0 looks: a run that is training meanwhile has another newest checkpoint at every moment.
    found = str(find_initial(name, root=config.run.root)) if world.is_main else None
    checkpoint = Checkpoint(Path(world.broadcast_text(found)))
    source = checkpoint if config.checkpoint.init_optimizer else WeightsOnly(checkpoint)
    trainer.engine.load(source, num_updates=0)
    checkpoint.close()
    what = "weights and optimizer states" if config.checkpoint.init_optimizer else "weights"
    trainer.recorder.message(f"begins with the {what} of {checkpoint.folder}")


def _start_loader(trainer: Trainer, plan: BatchPlan) -> BatchLoader:
    config, world, task = trainer.config, trainer.world, trainer.task
    samples = task.samples("train")
    return build_loader(
        samples,
        sampler=MicroBatchSampler(
            GlobalSampleOrder(len(samples), seed=config.run.seed),
            plan=plan,
            rank=world.rank,
            # Counted on from the checkpoint, so that a resumed run neither repeats nor skips a sample.
            start_step=trainer.progress.step,
            start_sample=trainer.progress.samples_seen,
        ),
        collate=task.collate,
        data_config=config.data,
        pin_memory=world.device.type == "cuda",
    )


def _announce(
    trainer: Trainer, *, run: RunDirectory, attempt: int, selection: Selection, plan: BatchPlan, origin: Origin
) -> None:
    """Record and show the start of the attempt, with the memory of every rank. Collective."""
    world, step, resumed = trainer.world, trainer.progress.step, selection.checkpoint is not None
    # Every rank takes part in the gather, although only rank 0 shows the result.
    texts = world.gather_text(json.dumps(asdict(trainer.engine.memory())))
    memory = [MemoryReport(**json.loads(text)) for text in texts]
    num_samples = len(trainer.task.samples("train"))
    trainer.recorder.event(
        "start",
        step=step,
        run_id=run.run_id,
        attempt=attempt,
        resumed_from_step=step if resumed else None,
        world_size=world.world_size,
        device=_device_name(world.device),
        num_parameters=trainer.engine.num_parameters(),
        num_train_samples=num_samples,
        batch=asdict(plan),
        memory=[asdict(report) for report in memory],
        **asdict(origin),
    )
    if world.is_main:
        # Four show whether the states are sharded; thousands would fill the screen.
        states = "\n".join(f"  rank {rank}: {_states_text(report)}" for rank, report in enumerate(memory[:4]))
        trainer.recorder.message(
            f"run {run.run_id} in {run.path}\n"
            f"{'resumes at step ' + str(step) if resumed else 'starts'}: {origin.engine} on "
            f"{world.world_size} ranks ({_device_name(world.device)}), {trainer.engine.num_parameters()} parameters, "
            f"{num_samples} samples, {plan.global_size} a step = {plan.shares_text()} x {plan.accumulation} x "
            f"{plan.micro_size}\noptimizer states:\n{states}" + ("\n  ..." if len(memory) > 4 else "")
        )


def _note_scaled_rate(config: Config, recorder: Recorder, *, step: int, was: int, now: int) -> None:
    """Report how ``training.lr.scale_with: world_size`` changes the rate of a run that has changed its size."""
    if was == now or config.training.lr.scale_with == "none":
        return
    old, new = (scaled_rate(config.training.lr, size) for size in (was, now))
    recorder.event("rescaled_rate", step=step, world_size_was=was, world_size=now, rate_was=old, rate=new)
    recorder.message(
        f"training.lr.scale_with=world_size: {now} ranks instead of {was} make the rate {new:g} instead of {old:g}; "
        "training.lr.scale_with=none keeps it"
    )


def _states_text(memory: MemoryReport) -> str:
    emas = {kind: num_bytes for kind, num_bytes in memory.states.items() if kind != "step"}
    return ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in emas.items())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _origin(config: Config) -> Origin:
    digest = hashlib.sha256(repr(asdict(config)).encode()).hexdigest()[:16]
    return Origin(engine=config.engine.spec.name, config_hash=digest, versions=installed_versions(*_PACKAGES))
