"""Real ranks that train, save, and are killed at a random call; the next attempt has other ranks and another engine.

    python -m support.killing FOLDER FIRST_SEED NUM_SEEDS

Beside its checkpoints every rank keeps what it held when it began to save: the truth that what is loaded must equal.
One warm process forks the ranks. Prints one JSON object.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.checkpoint import store as store_module
from anemoi_dist.checkpoint import writer
from anemoi_dist.checkpoint.manifest import Origin
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Saver
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.zero import _import_deepspeed
from anemoi_dist.tasks.base import Evaluation
from anemoi_dist.training.trainer import Trainer
from support import reshard, toy
from support.waiting import PATIENCE_S

MAX_STEPS, INTERVAL = 12, 2
ATTEMPTS = 5


class Silence:
    """Recorder, task and stop request of a run that nobody watches or scores."""

    run = None

    def event(self, name: str, *, step: int, **fields: Any) -> None: ...
    def message(self, text: str) -> None: ...
    def step(self, *args: Any, **fields: Any) -> None: ...
    def clear(self) -> None: ...
    def value(self) -> int:
        return 0

    def validation(self, *args: Any) -> None: ...
    def phase(self, name: str) -> Any:
        return nullcontext()

    def begin_step(self, step: int) -> None:
        pass

    def after_save(self, step: int, **_: Any) -> list[str]:
        return []

    def evaluate(self, *args: Any, **fields: Any) -> Evaluation:
        return Evaluation()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def die_at(countdown: int) -> None:
    """Kill this process at the ``countdown``-th of the calls that matter."""
    left = itertools.count(countdown, -1)

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (writer.HashingFile, "_append"),
        (writer, "make_durable"),
        (store_module, "write_atomically"),
        (store_module, "fsync_directory"),
        (store_module.shutil, "rmtree"),
        (Path, "rename"),
        (Trainer, "_record"),
    ):
        setattr(owner, name, dying(getattr(owner, name)))


def run_rank(folder: Path, engine_name: str, attempt: int) -> None:
    """Train on this rank to the end."""
    world = World.join(timeout_s=PATIENCE_S)
    config = reshard.make_config(engine_name, max_steps=MAX_STEPS)
    config.checkpoint.interval_steps, config.checkpoint.keep_last = INTERVAL, 2
    engine = reshard.build(world, config)
    store = LocalStore(folder / "checkpoints")
    origin = Origin(engine=engine_name, config_hash="0", versions={})
    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        task=Silence(),  # type: ignore[arg-type]
        saver=Saver(store, world=world, config=config.checkpoint, origin=origin),
        recorder=Silence(),  # type: ignore[arg-type]
        stop=Silence(),  # type: ignore[arg-type]
    )
    checkpoint = select(store, world=world).checkpoint
    if checkpoint is not None:
        trainer.resume(checkpoint)
        check_shards(engine, folder, checkpoint)
        checkpoint.close()
    shards = engine.shards

    def recorded() -> Any:
        if trainer.progress.step:
            keep_truth(folder, trainer.progress.step, attempt, toy.clone_shards_of(shards()), world)
        return shards()

    engine.shards = recorded  # type: ignore[method-assign]

    def batches() -> Any:
        for step in itertools.count(trainer.progress.step):
            yield toy.micro_batches(config, world, step)

    trainer.fit(batches())
    world.leave()


def keep_truth(folder: Path, step: int, attempt: int, shards: list[Any], world: World) -> None:
    path = folder / "truth" / f"{step:03d}-{attempt}-{world.world_size}-{world.rank}.pt"
    torch.save([(s.fqn, s.kind, s.global_shape, s.start, s.tensor) for s in shards], path)


def truth(folder: Path, step: int) -> list[dict[str, torch.Tensor]]:
    """Return what the ranks held at a step in each attempt in which all of them came so far."""
    attempts: dict[str, list[Path]] = {}
    for path in sorted((folder / "truth").glob(f"{step:03d}-*.pt")):
        attempts.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    wholes = []
    for name, paths in attempts.items():
        if len(paths) == int(name.rsplit("-", 1)[1]):
            wholes.append(toy.whole_tensors([[toy.Shard(*row) for row in torch.load(path)] for path in paths]))
    return wholes


def check_shards(engine: Any, folder: Path, checkpoint: Checkpoint) -> None:
    """What the engine holds after loading is, piece by piece, what was held when the checkpoint was saved."""
    wholes = truth(folder, checkpoint.manifest.step)

    def matches(whole: dict[str, torch.Tensor]) -> bool:
        for shard in engine.shards():
            expected = whole[f"{shard.fqn}:{shard.kind}"].reshape(-1)
            if not torch.equal(shard.tensor, expected[shard.start : shard.start + shard.tensor.numel()]):
                return False
        return True

    assert any(matches(whole) for whole in wholes), f"step {checkpoint.manifest.step} is not what was saved"


def check_newest(folder: Path) -> int:
    """Return the newest step, after comparing all of it with the truth."""
    from support.saving import SingleRank, read_all

    store = LocalStore(folder / "checkpoints")
    if not store.steps():
        return 0
    checkpoint = select(store, world=SingleRank(), strict=True).checkpoint  # type: ignore[arg-type]
    assert checkpoint is not None
    loaded = {f"{fqn}:{kind}": read_all(checkpoint, fqn, kind) for fqn, kind in checkpoint.tensors()}
    step = checkpoint.manifest.step
    checkpoint.close()
    for whole in truth(folder, step):
        if whole.keys() == loaded.keys() and all(torch.equal(loaded[key], value) for key, value in whole.items()):
            return step
    raise AssertionError(f"step {step} is not what was saved")


def start(rank: int, size: int, port: int, victim: int, countdown: int, *arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        if rank == victim:
            die_at(countdown)
        run_rank(*arguments)
        code = 0
    except AssertionError:
        traceback.print_exc()
        code = 1
    except BaseException:
        if victim < 0:
            traceback.print_exc()
    finally:
        os._exit(code)


def attempt(folder: Path, engine: str, size: int, number: int, *, victim: int, countdown: int) -> str:
    """Run ranks to their end; return ``done``, ``killed``, or what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {start(r, size, port, victim, countdown, folder, engine, number): r for r in range(size)}
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(codes) < size:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
            if codes.get(victim) == -signal.SIGKILL:  # the launcher would end the others
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        elif time.monotonic() > deadline:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return f"{engine} on {size} ranks hangs"
        else:
            time.sleep(0.002)
    if codes.get(victim) == -signal.SIGKILL and 1 not in codes.values():
        return "killed"
    return "done" if not any(codes.values()) else f"{engine} on {size} ranks: {codes}"


def play(folder: Path, seed: int) -> Counter[str]:
    """Train one run to its end through kills, on other ranks each time."""
    rng, seen = random.Random(seed), Counter[str]()
    for name in ("checkpoints", "truth"):
        (folder / name).mkdir(parents=True)
    newest = 0
    for number in range(ATTEMPTS + 1):
        engine, size = rng.choice(list(toy.ENGINES)), rng.choice((1, 2, 3))
        victim = rng.randrange(size) if number < ATTEMPTS else -1
        result = attempt(folder, engine, size, number, victim=victim, countdown=rng.randint(1, 40))
        if result not in ("killed", "done"):
            raise AssertionError(result)
        seen[result] += 1
        step = check_newest(folder)
        assert step >= newest, f"step {newest} was there, {step} is the newest"
        newest = step
        if result == "done":
            break
    assert newest == MAX_STEPS, f"step {newest} is the last"
    return seen


def main(root: Path, first_seed: int, num_seeds: int) -> None:
    torch.set_num_threads(1)
    _import_deepspeed()
    importlib.import_module("torch._inductor.compile_fx")  # DeepSpeed's first engine imports it, in every rank
    gc.freeze()
    seen, problems = Counter[str](), []
    for seed in range(first_seed, first_seed + num_seeds):
        try:
            seen += play(root / str(seed), seed)
        except Exception as error:
            problems.append(f"seed {seed}: {error}")
    print(json.dumps({"seeds": num_seeds, **seen, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
