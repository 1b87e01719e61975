"""The main job: train what a config describes, stage after stage, and go on from where it was stopped.

    python -m lightning_jax.train --config=configs/minimax_m1.py

The state after step n, and every number logged until then, is a function of the config and n alone: a run that was
killed and started again ends with the same bits as one that never was.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from lightning_jax.checkpoints import Checkpoints, run_lock
from lightning_jax.command_line import run_command_in, say
from lightning_jax.config import ConfigError, RunConfig, differences
from lightning_jax.hosts import Hosts, add_arguments, check_shared, join, run_facts, watch
from lightning_jax.init_from import begin_value, begin_with, freeze_base
from lightning_jax.input_pipeline import cache_folder
from lightning_jax.mesh_problems import problems_on
from lightning_jax.metrics import StepTimer
from lightning_jax.model_folders import CHECKPOINTS
from lightning_jax.planning.hardware import slice_of
from lightning_jax.planning.meshes import CHOICES, MESH_HELP, with_mesh
from lightning_jax.programs import Programs
from lightning_jax.references import Reference, RunningStage, reference_of
from lightning_jax.reinforcement.stage_data import RolloutData
from lightning_jax.reinforcement.stage_data import check as check_reinforcement
from lightning_jax.run_record import NonFiniteError, RunRecord
from lightning_jax.run_setup import global_batches, open_run, record_run
from lightning_jax.signals import StopRequest, stop_requests
from lightning_jax.stage_data import CorpusData, StageData
from lightning_jax.stages import Stage, plan_stages
from lightning_jax.stored_config import stored_fields, to_store
from lightning_jax.train_step import TrainState
from lightning_jax.validation import Measures, Validation, samples

# What may change between two starts of a run without making it another run.
FREE_TO_CHANGE = (
    "size_reason",
    "mesh",
    "checkpoints",
    "metrics",
    "max_nonfinite_steps",
    "hang_minutes",
    "data.cache_dir",
    "stages.*.reinforcement.rollouts.devices",
)


class Trainer:
    """A run in its folder: `Trainer(config, folder).train()` does all of it.

    Args:
      config: what to train.
      folder: of the run; where it holds checkpoints, the run goes on from the newest that verifies.
      init_from: folder of another run, whose parameters a run without checkpoints begins with; None for fresh ones.
      change_config: go on although the config is not the one that the run was started with.
      hosts: of the run, from `hosts.join`; this one alone if None.

    Raises:
      UserError: something that the user has to change; one line for each.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: pathlib.Path,
        *,
        init_from: pathlib.Path | None = None,
        change_config: bool = False,
        hosts: Hosts | None = None,
    ):
        if problems := problems_on(config, jax.device_count()):
            raise ConfigError(problems)
        self.folder, self.hosts = folder, hosts or Hosts()
        self.init_from, self.change_config = init_from, change_config
        self.record = RunRecord(folder)
        self._say = self.record.say
        check_reinforcement(config, self._say)
        check_shared(folder, self.hosts)
        self.config, self.data = open_run(config, self._say)
        self.hosts.agree("the data", {f"data of {name}": each for name, each in self.data.fingerprints.items()})
        self.stages = plan_stages(self.config)
        self.programs = Programs(self.config, self.stages)

    def train(self) -> int:
        """Trains to the end, or until a signal comes; returns the exit code of the process.

        Raises:
          UserError: something that the user has to change; one line for each.
          NonFiniteError: training diverged.
        """
        lock = run_lock(self.folder) if jax.process_index() == 0 else contextlib.nullcontext()
        with lock, watch(self.hosts, 60 * self.config.hang_minutes), contextlib.ExitStack() as stack:
            self.hosts.at(0, "opening the run")
            checkpoints, state = self._open(stack)
            first_step = int(state.step)
            try:
                with stop_requests(self.hosts.count > 1) as stop:
                    for stage in self.stages:
                        if int(state.step) < stage.last_step and not stop:
                            state = self._train_stage(stage, state, checkpoints, stop)
                checkpoints.wait()
            except NonFiniteError:
                self.record.report()
                raise
            step = int(state.step)
            if stop:
                self.record.event("preempted", f"{stop.signal.name}: saved at step {step}", step=step)
                self.record.report()
                self._say(f"stopped and saved at step {step:,}; the same command goes on from there")
            else:
                if step > first_step:
                    self.record.event("finish", f"after step {step}", step=step)
                self.record.report()
                self._say(f"complete after {step:,} steps; for another run give another --workdir")
        return stop.exit_code

    def _open(self, stack: contextlib.ExitStack) -> tuple[Checkpoints, TrainState]:
        """Restores or begins, and opens everything that the stages share."""
        say = self.record.say_of_checkpoints
        checkpoints = stack.enter_context(Checkpoints(self.folder / CHECKPOINTS, self.config.checkpoints, say=say))
        state, saved = self._restore_or_create(checkpoints)
        step = int(state.step)
        if self.hosts.index == 0:
            (self.folder / "config.json").write_text(self.config.to_json() + "\n")
        self.record.open(stack, self.config, self.stages, step=step, resumes=saved is not None)
        self._metadata = {
            **to_store(self.config),
            "data": self.data.fingerprints,
            "references": saved.get("references", {}) if saved else {},
            "rollouts": saved.get("rollouts", {}) if saved else {},
        }
        if saved:
            self._accept(
                f"data of {name}: not what the run was started with (other files, or other versions of packages)"
                for name, fingerprint in self.data.fingerprints.items()
                if saved["data"].get(name, fingerprint) != fingerprint
            )
        record_run(self.config, self.stages, self.data, self.folder, step)
        self.record.event("resume" if saved else "start", f"at step {step}", step=step)
        self.timer = StepTimer()
        return checkpoints, state

    def _restore_or_create(self, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any] | None]:
        """The state to go on with, and the metadata it was saved with, if this run had saved it."""
        say = self.record.say_of_checkpoints
        if restored := checkpoints.restore(self.programs.abstract_state):
            if self.config.lora:
                freeze_base(self.folder, self.config, self.programs, say)
            before = stored_fields(RunConfig, restored.metadata, self.folder)
            current = json.loads(self.config.to_json())
            self._accept(differences(before, current, ignore=FREE_TO_CHANGE))
            say(f"resumed from the checkpoint of step {restored.step}")
            return restored.state, restored.metadata
        state = self.programs.first_state()
        if self.init_from is not None:
            return begin_with(self.init_from, state, self.folder, self.config, self.programs, say), None
        if self.config.lora:
            raise ConfigError(["config.lora: adapters belong to a model; name the folder of its run by --init_from"])
        if (first := self.stages[0]).config.objective != "next_token":
            self._say(f"stage {first.name} begins with fresh weights; --init_from=FOLDER begins with those of a run")
        return state, None

    def _accept(self, changes: Iterable[str]) -> None:
        """Refuses to go on with another config or other data than those of the checkpoint, unless told to."""
        changes = list(changes)
        if changes and not self.change_config:
            raise ConfigError(
                [f"{line}; use another --workdir, or --change_config to go on in {self.folder}" for line in changes]
            )
        for line in changes:
            self.record.say_of_checkpoints(f"changed: {line}")

    def _train_stage(self, stage: Stage, state: TrainState, checkpoints: Checkpoints, stop: StopRequest) -> TrainState:
        """Makes the stage's steps from the state's on, up to its last or to a stop; the state returned is saved."""
        first_step = int(state.step)
        if stage.config.value and first_step == stage.first_step:
            state = begin_value(state, stage, self.programs, self._say)
        data, validate = self._stage_data(stage, state)
        steps = f"steps {first_step + 1:,} to {stage.last_step:,}"
        self._say(f"stage {stage.name}: {steps}, context {stage.config.context_length:,}; {data.description}")
        train_steps: dict[int, Callable] = {}  # by rows of the batch
        unreported: tuple[int, dict[str, jax.Array]] | None = None
        with contextlib.closing(data):
            if stage.config.reinforcement and first_step == stage.first_step:
                self._validate(stage, first_step + 1, validate, state)  # of the policy that the first step finds
            for step in range(first_step, stage.last_step):
                in_stage = step - stage.first_step
                needs_params = data.needs_params(in_stage)
                self.record.step = step + 1
                self.hosts.at(step + 1, "reading its batch")
                if needs_params and unreported:
                    self._report(stage, data, *unreported)
                    unreported = None
                with self.timer.pause() if needs_params else contextlib.nullcontext():
                    batch = data.batch(in_stage, state)
                rows = len(batch["inputs"])
                compiling = rows not in train_steps
                self.hosts.at(step + 1, "compiling" if compiling else "beginning the step")
                if compiling:
                    train_steps[rows] = self.programs.train_step(stage, rows)
                with self.timer.pause() if compiling else contextlib.nullcontext():
                    state, metrics = train_steps[rows](state, batch, *self.programs.frozen)
                if unreported:  # only now, so that the devices have this step to work on while the host reads that one
                    self._report(stage, data, *unreported)
                unreported = step + 1, metrics

                ends, stopping = step + 1 == stage.last_step, stop.after(step + 1)
                evaluating = ends or (step + 1) % self.config.metrics.evaluate_every_steps == 0
                saving = checkpoints.due(step + 1, time.monotonic()) or ends or stopping
                if not (evaluating or saving):
                    continue
                # A checkpoint's step must be on record before it is committed.
                self._report(stage, data, *unreported)
                unreported = None
                with self.timer.pause():
                    if evaluating:
                        self._validate(stage, step + 1, validate, state)
                    if ends:
                        self.hosts.at(step + 1, "writing samples")
                        self._write_samples(stage, state)
                    if saving:
                        self.hosts.at(step + 1, "saving a checkpoint")
                        self._metadata["rollouts"] = {stage.name: data.position} if data.position else {}
                        checkpoints.save(step + 1, state, self._metadata, wait=stopping)
                if stopping:
                    break
        return state

    def _stage_data(self, stage: Stage, state: TrainState) -> tuple[StageData, Callable[[nnx.State], Measures]]:
        """The batches of a stage from the state's step on, and what measures parameters on what is held out."""
        begins = int(state.step) == stage.first_step
        saved_key = None if begins else self._metadata["references"].get(stage.name)
        running = RunningStage(stage, self.programs, saved_key, self.folder, self._say, self._at_work)
        evaluation_batches = self.config.metrics.evaluation_batches
        if stage.config.reinforcement:
            saved = None if begins else self._metadata["rollouts"][stage.name]
            prompts = {name: self.data.prompts[name] for name in stage.config.mixture.start}
            record = functools.partial(self.record.rollouts, stage)
            data = RolloutData(self.config, prompts, self.data.tokenizer, state, saved, running, record)
            self._metadata["references"] |= {stage.name: data.reference_key}
            most = evaluation_batches * stage.config.reinforcement.rollouts.slots
            return data, lambda params: {"validation_reward": data.validation_rewards(params, most)}
        corpora = {name: self.data.corpora[name] for name in stage.config.mixture.start}
        reference = reference_of(state, corpora, running) if stage.config.preference else Reference(corpora)
        self._metadata["references"] |= {stage.name: reference.key}
        batches = global_batches(self.stages, stage, reference.corpora, seed=self.config.seed, host=self.programs.host)
        data = CorpusData(batches, int(state.step) - stage.first_step, self.programs, reference)
        return data, Validation(stage, reference, self.programs, evaluation_batches)

    def _validate(self, stage: Stage, step: int, validate: Callable[[nnx.State], Measures], state: TrainState) -> None:
        """Measures the state on what is held out, and puts it on record."""
        self.hosts.at(step, "evaluating")
        self.record.measures(stage, step, validate(state.params))

    def _at_work(self, doing: str) -> None:
        self.hosts.at(self.record.step, doing)

    def _report(self, stage: Stage, data: StageData, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the numbers of a step, which waits for it, and puts them on record."""
        self.hosts.at(step, "waiting for its devices", waits=True)
        values = jax.device_get(metrics)
        self.hosts.at(step, "reporting")
        in_stage = step - 1 - stage.first_step
        tokens = stage.batch_sizes.rows(in_stage) * stage.config.context_length
        self.timer.step(tokens)
        skipped = int(values.pop("nonfinite_steps"))
        if skipped:
            self.record.skipped(step, data.again(in_stage), skipped)
        intervals = self.config.metrics
        if step % intervals.log_every_steps and step != stage.last_step and not skipped:
            return
        flops = self.config.model.flops_per_token(stage.config.context_length, intervals.flops_convention)
        timing = self.timer.lap(flops, self.programs.mesh.devices.flat)
        self.record.progress(stage, step, values, timing)

    def _write_samples(self, stage: Stage, state: TrainState) -> None:
        for prompt, text in samples(self.config, stage, self.data, self.programs.merged(state.params), self.programs):
            self.record.sample(stage, int(state.step), prompt, text)


def _keep_compiled_programs(folder: pathlib.Path) -> None:
    """Lets a run that goes on, or is made again, start without compiling; the user's own setting comes first."""
    if jax.config.jax_compilation_cache_dir is None:
        # What lies in it is executed, so nobody else may write there.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake, 1 where training diverged, 75 to be started again."""
    parser = argparse.ArgumentParser(prog="python -m lightning_jax.train", description="Trains, or goes on training.")
    parser.add_argument("--workdir", metavar="FOLDER", help="folder of the run; runs/NAME_OF_THE_CONFIG if not given")
    parser.add_argument("--init_from", metavar="FOLDER", type=pathlib.Path, help="begin with another run's parameters")
    parser.add_argument("--change_config", action="store_true", help="go on with a config that was changed")
    parser.add_argument("--mesh", choices=CHOICES, help=MESH_HELP)
    add_arguments(parser)

    def command(options: argparse.Namespace, config: RunConfig, hosts: Hosts) -> int:
        if options.mesh:
            config, why = with_mesh(config, options.mesh, plan_stages(config), slice_of(jax.devices()))
            say(why)
        folder = pathlib.Path(options.workdir or pathlib.Path("runs") / config.name)
        own = {"init_from": options.init_from, "change_config": options.change_config}
        hosts.agree("what to run", run_facts(config, own | {"workdir": folder}), timeout=options.join_timeout)
        _keep_compiled_programs(cache_folder(config.data) / "compiled")
        try:
            return Trainer(config, folder, **own, hosts=hosts).train()
        except NonFiniteError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    try:
        return run_command_in(join, parser, command, arguments)
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
