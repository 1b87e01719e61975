"""From a config file and command-line overrides to one validated, frozen `RunConfig`.

At the edge a config is Python: `get_config(arg)` in a file returns an ml_collections.ConfigDict that names everything.
Inside it is typed: the frozen dataclasses of each package are the schema, and whatever does not fit them is reported
all at once, one line each, with the nearest valid name.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict

from lightning_jax.checkpoints.config import CheckpointConfig
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.config import DataConfig, MixtureConfig
from lightning_jax.metrics.config import MetricsConfig
from lightning_jax.models.config import ModelConfig
from lightning_jax.objectives.config import PreferenceConfig, RewardModelConfig
from lightning_jax.optimizers import BatchSizeConfig, BatchSizes, OptimizerConfig, ScheduleConfig
from lightning_jax.parallel.config import MeshConfig
from lightning_jax.parallel.mesh import MeshError, resolve


class ConfigError(UserError):
    """Everything that is wrong with a config, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class PassesConfig:
    """The length of a stage in passes over its corpora: its tokens and its schedule's steps follow from the data."""

    count: float
    warmup_share: float  # of the steps; a schedule that falls does so over all the others

    def problems(self) -> list[str]:
        found = [] if self.count > 0 else [f"count: {self.count} is not positive"]
        if not 0 <= self.warmup_share < 1:
            found.append(f"warmup_share: {self.warmup_share} is not in [0, 1)")
        return found


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training: what is minimised, on which data, for how long."""

    objective: Literal["next_token", "preference", "reward_model"]
    reduction: Literal["token_mean", "conversation_sum"]  # of "next_token" over its targets
    preference: PreferenceConfig | None
    reward_model: RewardModelConfig | None
    tokens: int  # length of the stage, targets and padding alike; with `passes` it follows from the data
    passes: PassesConfig | None
    context_length: int
    rope_theta: float
    mixture: MixtureConfig
    batch_size: BatchSizeConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    @property
    def documents_per_example(self) -> int:
        """Chats that belong together."""
        return 1 if self.objective == "next_token" else 2

    def problems(self) -> list[str]:
        found = []
        for name in ("preference", "reward_model"):
            if (getattr(self, name) is not None) != (self.objective == name):
                found.append(f'{name}: belongs to objective="{name}", and this is "{self.objective}"')
        if self.objective != "next_token" and self.mixture.packing == "split":
            found.append('mixture.packing: "split" would cut pairs; "best_fit" or "one_per_row"')
        if self.context_length < 1:
            found.append(f"context_length: {self.context_length} is not positive")
        elif not self.passes and self.tokens < max(self.batch_size.tokens, default=0):
            found.append(f"tokens: {self.tokens} is less than one batch of {max(self.batch_size.tokens)}")
        for batch_tokens in self.batch_size.tokens:
            if self.context_length > 0 and batch_tokens % self.context_length:
                nearest = max(1, round(batch_tokens / self.context_length)) * self.context_length
                found.append(
                    f"batch_size.tokens: {batch_tokens} is no multiple of context_length={self.context_length}; "
                    f"{nearest} would be"
                )
        if 0 < self.batch_size.micro_batch_tokens < self.context_length:
            found.append(
                f"batch_size.micro_batch_tokens: {self.batch_size.micro_batch_tokens} is less than a row of "
                f"context_length={self.context_length}; make it at least that, or 0 for no micro-batches"
            )
        if not (found or self.passes or self.batch_size.problems() or self.schedule.problems()):
            sizes = BatchSizes(self.batch_size, self.context_length, self.tokens)
            found.extend(f"schedule.{problem}" for problem in self.schedule.problems_in(sizes.num_steps))
        return found


@dataclass(frozen=True)
class RunConfig:
    """A run: one model, its data, and the stages it goes through in order."""

    name: str
    size_reason: str  # why this size: said at the start of the run
    seed: int
    model: ModelConfig
    data: DataConfig
    mesh: MeshConfig
    stages: dict[str, StageConfig]
    run_stages: tuple[str, ...]  # which of the stages to run, in this order
    checkpoints: CheckpointConfig
    metrics: MetricsConfig
    max_nonfinite_steps: int  # so many skipped steps in a row stop the run

    def problems(self) -> list[str]:
        found = []
        for stage in self.run_stages:
            if stage not in self.stages:
                found.append(f"run_stages: no stage {stage!r}; {nearest_name(stage, self.stages)}")
        if len(set(self.run_stages)) < len(self.run_stages):
            found.append("run_stages: a stage is named twice; name each once")
        for name, stage in self.stages.items():
            for corpus in {**stage.mixture.start, **stage.mixture.end}:
                if corpus not in self.data.corpora:
                    found.append(
                        f"stages.{name}.mixture: no corpus {corpus!r} in data.corpora; "
                        f"{nearest_name(corpus, self.data.corpora)}"
                    )
            found += [f"stages.{name}.{problem}" for problem in self._problems_of_content(stage)]
        if "reward_model" in {self.stages[name].objective for name in self.run_stages if name in self.stages} and (
            len(self.run_stages) > 1
        ):
            found.append(
                "run_stages: a reward model has parameters of its own; run its stage alone, with --init_from=FOLDER "
                "of the run before it"
            )
        moments = {self.stages[name].optimizer.moment_dtype for name in self.run_stages if name in self.stages}
        if len(moments) > 1:
            found.append(
                "stages: optimizer.moment_dtype differs between stages; one state serves all, choose one dtype"
            )
        if not self.run_stages:
            found.append(f"run_stages: no stage; {nearest_name('', self.stages)}")
        if self.data.tokenizer.vocab_size > self.model.vocab_size:
            found.append(
                f"data.tokenizer.vocab_size: {self.data.tokenizer.vocab_size} exceeds "
                f"model.vocab_size={self.model.vocab_size}; make it at most that"
            )
        return found

    def _problems_of_content(self, stage: StageConfig) -> list[str]:
        """What of a stage's corpora its objective and packing have no use for."""
        wanted = ("text", "conversations") if stage.objective == "next_token" else ("preferences",)
        found = []
        for name in stage.mixture.start:
            content = self.data.corpora[name].content if name in self.data.corpora else wanted[0]
            if content not in wanted:
                found.append(f'mixture: {name} is {content}; "{stage.objective}" trains on {" or ".join(wanted)}')
            elif (content, stage.mixture.packing) in (("text", "one_per_row"), ("conversations", "split")):
                found.append(f'mixture.packing: "{stage.mixture.packing}" is not for {content}, and {name} is that')
        return found

    def problems_on(self, num_devices: int) -> list[str]:
        """What keeps this config from running on `num_devices` devices: sizes that the mesh does not divide."""
        try:
            mesh = self.resolved_mesh(num_devices)
        except MeshError as error:
            return [f"config.{error}"]
        model = self.model
        splits = [
            ("model.num_heads", model.num_heads, "tensor", mesh["tensor"]),
            ("model.intermediate_size", model.intermediate_size, "tensor", mesh["tensor"]),
            ("model.vocab_size", model.vocab_size, "tensor", mesh["tensor"]),
            (
                "model.hidden_size",
                model.hidden_size,
                "fsdp x sequence x expert",
                mesh["fsdp"] * mesh["sequence"] * mesh["expert"],
            ),
        ]
        if "softmax" in model.layer_pattern:
            splits.append(("model.num_kv_heads", model.num_kv_heads, "tensor", mesh["tensor"]))
        if model.num_experts:
            splits.append(("model.num_experts", model.num_experts, "expert", mesh["expert"]))
        shards = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        for name in self.run_stages:
            stage = self.stages[name]
            for tokens in stage.batch_size.tokens:
                rows = tokens // stage.context_length
                field = f"stages.{name}.batch_size.tokens / context_length"
                splits.append((field, rows, "data x fsdp x expert", shards))
            if mesh["sequence"] > 1:
                # Softmax layers give each device two pieces of a row, so that all have the same work.
                field, pieces = f"stages.{name}.context_length", 2 * mesh["sequence"]
                splits.append((field, stage.context_length, "2 x sequence", pieces))
                if model.num_experts and model.expert_dispatch == "capacity":
                    # Each device counts the places of whole groups.
                    pieces = model.capacity_group * mesh["sequence"]
                    splits.append((field, stage.context_length, "sequence x model.capacity_group", pieces))
        return [
            f"config.{field}: {size} does not divide over mesh {axis}={parts}; make it a multiple of {parts}"
            for field, size, axis, parts in splits
            if size % parts
        ]

    def resolved_mesh(self, num_devices: int) -> dict[str, int]:
        """The size of each mesh axis. Raises MeshError where the mesh does not fit the devices."""
        return resolve(self.mesh, num_devices)

    def to_json(self) -> str:
        """The resolved config, as it is written beside every run and into every checkpoint."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """The end of an error line about an unknown name: what might have been meant, and what there is."""
    names = [str(each) for each in valid]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there is {', '.join(names)}" if names else "there is none"


def differences(before: Any, after: Any, *, ignore: Sequence[str] = (), path: str = "") -> list[str]:
    """Where two configs, as JSON holds them, differ: a line for each field, but for what lies at a path of `ignore`."""
    if path in ignore or before == after:
        return []
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [f"config.{path} is {json.dumps(after)}, but was {json.dumps(before)} when the run was started"]
    return [
        line
        for name in sorted(before.keys() | after.keys())
        for line in differences(
            before.get(name), after.get(name), ignore=ignore, path=f"{path}.{name}" if path else name
        )
    ]


def load_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads `path.py` or `path.py:arg`, applies overrides such as `"model.num_layers=8"`, and validates.

    Raises ConfigError with all problems at once.
    """
    config, problems = _read_file(spec), []
    for override in overrides:
        problem = _apply_override(config, override)
        if problem:
            problems.append(problem)
    run, more = parse(RunConfig, config)
    if problems or more:
        raise ConfigError(problems + more)
    return run


INVALID = object()  # stands for a value that does not have its type; one that breaks a rule still has


def parse(schema: Any, value: Any, path: str = "config") -> tuple[Any, list[str]]:
    """Checks `value` against a type of the schema. Returns (the typed value or INVALID, problems)."""
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if dataclasses.is_dataclass(schema):
        return _parse_section(schema, value, path)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None, []
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return parse(inner, value, path)
    if origin is Literal:
        if value in arguments:
            return value, []
        return INVALID, [f"{path}: {value!r} is not a choice; {nearest_name(str(value), arguments)}"]
    if origin is tuple and isinstance(value, list | tuple):
        return _gather(tuple, [parse(arguments[0], each, f"{path}[{i}]") for i, each in enumerate(value)])
    if origin is dict and isinstance(value, ConfigDict | Mapping):
        parsed = [parse(arguments[1], each, f"{path}.{key}") for key, each in value.items()]
        return _gather(lambda values: dict(zip(value, values, strict=True)), parsed)
    if schema is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value), []
        return INVALID, [f"{path}: {value} is not a finite number"]
    if schema in (int, str, bool) and type(value) is schema:
        return value, []
    return INVALID, [f"{path}: {value!r} is {type(value).__name__}, not {_type_name(schema)}"]


def _parse_section(schema: type, value: Any, path: str) -> tuple[Any, list[str]]:
    if not isinstance(value, ConfigDict | Mapping):
        return INVALID, [f"{path}: {value!r} is not a section with the fields of {schema.__name__}"]
    hints = typing.get_type_hints(schema)
    problems = [f"{path}.{name}: no such field; {nearest_name(name, hints)}" for name in value if name not in hints]
    fields = {}
    for name, hint in hints.items():
        if name not in value:
            problems.append(f"{path}.{name}: missing ({_type_name(hint)})")
            continue
        fields[name], more = parse(hint, value[name], f"{path}.{name}")
        problems.extend(more)
    if INVALID in fields.values() or len(fields) < len(hints) or len(value) > len(hints):
        return INVALID, problems
    section = schema(**fields)
    check = getattr(section, "problems", None)
    problems += [f"{path}.{problem}" for problem in check()] if check else []
    return section, problems


def _gather(build: Any, parsed: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    values = [value for value, _ in parsed]
    return (INVALID if INVALID in values else build(values)), [problem for _, more in parsed for problem in more]


def _type_name(schema: Any) -> str:
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"names with {_type_name(arguments[1])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(argument) for argument in arguments)
    return {types.NoneType: "none"}.get(schema, schema.__name__)


def _read_file(spec: str) -> dict[str, Any]:
    """Executes the config file: a config is code, and is trusted as code is."""
    name, _, argument = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        others = (
            sorted(str(path.parent / each.name) for each in path.parent.glob("*.py")) if path.parent.is_dir() else []
        )
        raise ConfigError([f"--config={spec}: no file {name}; {nearest_name(name, others)}"])
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError([f"--config={spec}: {name} is not a Python file"])
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(argument)
    except Exception as error:
        where = f"{type(error).__name__}: " if not isinstance(error, ValueError) else ""
        raise ConfigError([f"--config={spec}: {where}{error}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError([f"--config={spec}: get_config returned {type(config).__name__}, not a ConfigDict"])
    return _plain(config)


def _plain(value: Any) -> Any:
    """Nested dictionaries without references: two stages that share a section in the file do not share it here."""
    if isinstance(value, ConfigDict):
        return {name: _plain(value[name]) for name in value}
    return value


def _apply_override(config: dict[str, Any], override: str) -> str | None:
    """Sets `a.b=text` in place, reading the text by the schema's type. Returns the problem, if there is one."""
    dotted, equals, text = override.partition("=")
    path = f"config.{dotted}"
    if not equals:
        return f"--{path}: no value; write --{path}=VALUE"
    schema: Any = RunConfig
    section, names = config, dotted.split(".")
    for depth, name in enumerate(names):
        here = ".".join(["config", *names[: depth + 1]])
        schema = _without_none(schema)
        if dataclasses.is_dataclass(schema):
            hints = typing.get_type_hints(schema)
            if name not in hints:
                return f"--{here}: no such field; {nearest_name(name, hints)}"
            schema = hints[name]
        elif typing.get_origin(schema) is dict:
            schema = typing.get_args(schema)[1]
            if dataclasses.is_dataclass(schema) and name not in section:
                return f"--{here}: no such name; {nearest_name(name, section)}"
        if depth + 1 == len(names):
            break
        if not dataclasses.is_dataclass(_without_none(schema)) and typing.get_origin(schema) is not dict:
            return f"--{path}: {here} is {_type_name(schema)}, it has no fields"
        section = section.get(name)
        if not isinstance(section, dict):
            return f"--{path}: {here} is not set in this config"
    try:
        section[names[-1]] = _from_text(schema, text)
    except ValueError:
        if dataclasses.is_dataclass(_without_none(schema)):
            fields = ", ".join(typing.get_type_hints(_without_none(schema)))
            return f"--{path}: a section; set one of its fields: {fields}"
        return f"--{path}={text}: not {_type_name(schema)}"
    return None


def _from_text(schema: Any, text: str) -> Any:
    """Reads command-line text as a type of the schema; ValueError if it is none."""
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else _from_text(_without_none(schema), text)
    if schema is str or (origin is Literal and all(isinstance(each, str) for each in arguments)):
        return text
    if schema is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if schema is int:
        value = float(text) if any(mark in text for mark in ".eE") else int(text.replace("_", ""))
        if value != int(value):
            raise ValueError(text)
        return int(value)
    if schema is float:
        return float(text)
    if origin is tuple:
        return tuple(_from_text(arguments[0], part) for part in text.strip("()[]").split(",") if part)
    if origin is dict and not dataclasses.is_dataclass(arguments[1]):
        pairs = [part.split(":") for part in text.strip("{}").split(",") if part]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(text)
        return {name.strip(): _from_text(arguments[1], each) for name, each in pairs}
    if origin is Literal:
        return ast.literal_eval(text)
    raise ValueError(text)


def _without_none(schema: Any) -> Any:
    if typing.get_origin(schema) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(schema) if each is not type(None))
    return schema
