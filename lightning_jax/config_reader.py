"""From a config file and command-line overrides to one validated, frozen `RunConfig`.

At the edge a config is Python: `get_config(arg)` in a file returns an ml_collections.ConfigDict that names everything.
Inside it is typed: the frozen dataclasses of each package are the schema, and whatever does not fit them is reported
all at once, one line each, with the nearest valid name.
"""

import ast
import dataclasses
import importlib.util
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from lightning_jax.config import ConfigError, RunConfig, nearest_name


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
        schema = without_none(schema)
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
        if not dataclasses.is_dataclass(without_none(schema)) and typing.get_origin(schema) is not dict:
            return f"--{path}: {here} is {_type_name(schema)}, it has no fields"
        if section.get(name) is None and dataclasses.is_dataclass(without_none(schema)):
            section[name] = {}  # what is missing in it will be told
        section = section.get(name)
        if not isinstance(section, dict):
            return f"--{path}: {here} is not set in this config"
    try:
        section[names[-1]] = _from_text(schema, text)
    except ValueError:
        if dataclasses.is_dataclass(without_none(schema)):
            fields = ", ".join(typing.get_type_hints(without_none(schema)))
            return f"--{path}: a section; set one of its fields: {fields}"
        return f"--{path}={text}: not {_type_name(schema)}"
    return None


def _from_text(schema: Any, text: str) -> Any:
    """Reads command-line text as a type of the schema; ValueError if it is none."""
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else _from_text(without_none(schema), text)
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


def without_none(schema: Any) -> Any:
    if typing.get_origin(schema) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(schema) if each is not type(None))
    return schema
