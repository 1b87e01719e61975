"""Configs as the folders of runs keep them, with the version of the schema, so that later versions of it read them.

A config names all its fields. One that came into the schema after a config was stored gets the value with which the
package does what it did then; so runs go on, and models load, as if nothing had been added.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_jax.config import PassesConfig, RunConfig, StageConfig
from lightning_jax.config_reader import INVALID, parse, without_none
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.config import CorpusConfig, DataConfig
from lightning_jax.models.config import ModelConfig
from lightning_jax.objectives.config import PreferenceConfig
from lightning_jax.parallel.config import MeshConfig
from lightning_jax.reinforcement.config import ReinforcementConfig, RewardConfig, RolloutConfig

Config = TypeVar("Config", RunConfig, ModelConfig)
NAMES = {RunConfig: "config", ModelConfig: "model"}  # in what a checkpoint says of itself

VERSION = 2
# By the version that they came with, the fields of each section and what the code did before. A field that comes into
# the schema begins a new version with a row of its own; one that leaves it makes stored configs unreadable.
CAME_WITH: dict[int, dict[type, dict[str, Any]]] = {
    2: {
        RunConfig: {"lora": None, "hang_minutes": 0.0},
        StageConfig: {
            "reduction": "token_mean",
            "preference": None,
            "reward_model": None,
            "reinforcement": None,
            "passes": None,
        },
        PassesConfig: {"decay_share": 1.0},
        DataConfig: {"chat_template": ""},
        CorpusConfig: {"content": "text", "turns": "all"},
        ModelConfig: {"capacity_group": 2**30},  # whole rows
        PreferenceConfig: {"reference": "cached"},
        MeshConfig: {
            "expert_tensor": 1,
            "sequence": 1,
            "sequence_attention": "ring",
            "gradient_dtype": "compute",
            "moments": "device",
        },
        ReinforcementConfig: {"value": None},
        RolloutConfig: {
            "epochs": 1,
            "staleness": 0,
            "lengths": None,
            "sample_filter": {},
            "curriculum": None,
            "devices": {},
        },
        RewardConfig: {
            "reward_model": None,
            "judge": None,
            "code_workers": 2,
            "unsafe_code": False,
            "length_alarm": 1.0,  # never
        },
    }
}


class StoredConfigError(UserError):
    """A stored config that this version of the package cannot read; one line."""


def to_store(config: RunConfig | ModelConfig) -> dict[str, Any]:
    """What a checkpoint says of the config that it belongs to, as JSON once it is written."""
    return {NAMES[type(config)]: dataclasses.asdict(config), "config_version": VERSION}


def read_stored(schema: type[Config], metadata: Mapping[str, Any], where: Path) -> Config:
    """The config that `to_store` put into a checkpoint's metadata, in this version of the package or an earlier one.

    Args:
        where: the folder that it is read from.

    Raises:
        StoredConfigError: a later version wrote it, or it has not the fields of its version.
    """
    config, problems = parse(schema, stored_fields(schema, metadata, where), NAMES[schema])
    if config is INVALID:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StoredConfigError(
            f"{where}: its config, of version {_version(metadata)}, cannot be read by this lightning_jax, which has "
            f"version {VERSION}: {problems[0]}{more}; the commit in its run.json reads it"
        )
    return config


def stored_fields(schema: type, metadata: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of a stored config, not checked, with those that came later. Raises as `read_stored` does."""
    if (version := _version(metadata)) > VERSION:
        raise StoredConfigError(
            f"{where}: its config has version {version}, and this lightning_jax reads up to {VERSION}; update it, at "
            "least to the commit in its run.json"
        )
    later: dict[type, dict[str, Any]] = {}
    for came_with, sections in CAME_WITH.items():
        for section, fields in sections.items() if came_with > version else ():
            later[section] = later.get(section, {}) | fields
    return _with_later(schema, metadata.get(NAMES[schema]), later)


def _version(metadata: Mapping[str, Any]) -> int:
    return metadata.get("config_version", 1)  # the first version did not say so


def _with_later(schema: Any, value: Any, later: Mapping[type, Mapping[str, Any]]) -> Any:
    """A value of the schema with the fields that it does not have yet."""
    schema = without_none(schema)
    if not isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(schema):
        hints, value = typing.get_type_hints(schema), {**later.get(schema, {}), **value}
        return {name: _with_later(hints.get(name), each, later) for name, each in value.items()}
    _, inner = typing.get_args(schema) or (None, None)  # of a dict
    return {name: _with_later(inner, each, later) for name, each in value.items()}
