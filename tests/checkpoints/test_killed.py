"""SIGKILL of a real process that saves: no committed checkpoint is lost, whatever the moment."""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from checkpoint_states import KEEP_ALL, abstract, arrays, assert_same_bits, save_steps

from lightning_jax.checkpoints import CheckpointConfig, Checkpoints
from lightning_jax.checkpoints import checkpoints as module
from lightning_jax.checkpoints.array_files import ArrayFiles

SIZE = 20_000
KEEP_TWO = CheckpointConfig(every_steps=1, every_minutes=0.0, keep_newest=2, keep_every_steps=0, max_failures=3)

# A server that has the imports done and JAX not yet started forks the processes to be killed.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lightning_jax.checkpoints", "flax.nnx", "optax"])


def train(folder: str, committed) -> None:
    """Goes on from the newest checkpoint, saving every step; sends each step that is known to be committed."""
    with Checkpoints(folder, KEEP_TWO) as checkpoints:
        restored = checkpoints.restore(abstract(arrays(0, SIZE)))
        step = restored.step if restored else 0
        while True:
            checkpoints.save(step + 1, arrays(step + 1, SIZE), {"step": step + 1})
            committed.send(step)  # the save of a step waits for that of the step before
            step += 1


def kill_while_training(folder: Path, after_s: float) -> int:
    """Kills a training process so long after its second checkpoint; returns the last step it knew to be committed."""
    receive, send = processes.Pipe(duplex=False)
    process = processes.Process(target=train, args=(str(folder), send))
    process.start()
    send.close()
    committed = [receive.recv(), receive.recv()]
    process.join(after_s)
    process.kill()
    process.join()
    while True:
        try:
            committed.append(receive.recv())
        except EOFError:
            return committed[-1]


def check_folder(folder: Path, at_least: int) -> int:
    """The newest step: all steps listed are whole, and none that was committed is missing."""
    with Checkpoints(folder, KEEP_TWO) as checkpoints:
        lines = []
        restored = checkpoints.restore(abstract(arrays(0, SIZE)), say=lines.append)
        assert not lines
        assert restored.step >= at_least
        assert restored.metadata == {"step": restored.step}
        assert_same_bits(restored.state, arrays(restored.step, SIZE))
    assert all(name.isdecimal() for name in os.listdir(folder))
    return restored.step


def run_and_kill(folder: Path, times: int) -> None:
    moments, newest = random.Random(0), 0
    for _ in range(times):
        committed = kill_while_training(folder, moments.uniform(0.0, 0.5))
        assert committed > newest
        newest = check_folder(folder, committed)


def test_killed_at_random_moments_no_committed_checkpoint_is_lost(tmp_path):
    run_and_kill(tmp_path, 3)


@pytest.mark.slow
def test_killed_many_times_no_committed_checkpoint_is_lost(tmp_path):
    run_and_kill(tmp_path, 20)


# The same at chosen moments. Each kills the process in the save of step 4, with 1, 2 and 3 there and two to keep.

MOMENTS = {
    "while the arrays are written": ((ArrayFiles, "start_writing"), {1, 2, 3}),
    "before the files are merged": ((ArrayFiles, "merge"), {1, 2, 3}),
    "before the manifest": ((module.Manifest, "write"), {1, 2, 3}),
    "before the commit": ((module.Path, "rename"), {1, 2, 3}),
    "between commit and deletion": ((module.Checkpoints, "_delete_old"), {1, 2, 3, 4}),
    "in the middle of a deletion": ((shutil, "rmtree"), {3, 4}),
}


def train_until(folder: str, moment: str) -> None:
    (owner, name), _ = MOMENTS[moment]
    original = getattr(owner, name)

    def act_and_die(*arguments, **options):
        if moment == "while the arrays are written":
            original(*arguments, **options)
        if moment == "in the middle of a deletion":
            next(path for path in Path(arguments[0]).rglob("*") if path.is_file()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    with Checkpoints(folder, KEEP_TWO) as checkpoints:
        setattr(owner, name, act_and_die)
        checkpoints.save(4, arrays(4, SIZE), {"step": 4}, wait=True)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_stage_of_a_save_what_is_listed_is_whole(tmp_path, moment):
    save_steps(tmp_path, [1, 2, 3], size=SIZE)
    process = processes.Process(target=train_until, args=(str(tmp_path), moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _, left = MOMENTS[moment]
    assert check_folder(tmp_path, max(left)) == max(left)
    listed = {int(name) for name in os.listdir(tmp_path)}
    assert left - {1, 2} <= listed
    for step in sorted(listed, reverse=True):
        with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
            assert_same_bits(checkpoints.restore(abstract(arrays(0, SIZE))).state, arrays(step, SIZE))
        shutil.rmtree(tmp_path / str(step))
