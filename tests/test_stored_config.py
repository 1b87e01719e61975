"""Configs that earlier commits stored are read, with what came later as the code did it then; others say why not."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import saved_run

from lightning_jax import stored_config
from lightning_jax.checkpoints.manifest import Manifest
from lightning_jax.config import RunConfig, differences
from lightning_jax.config_reader import without_none
from lightning_jax.model_folders import RunFolder
from lightning_jax.models import HybridLM, ModelConfig
from lightning_jax.stored_config import (
    CAME_WITH,
    VERSION,
    StoredConfigError,
    read_stored,
    stored_fields,
    to_store,
)

GOLDENS = Path(__file__).parent / "goldens"
EARLIER = sorted((GOLDENS / "stored_configs").glob("*.json"))  # by the commit that wrote them
RUN = Path("runs/earlier")


@pytest.fixture(params=EARLIER, ids=lambda path: path.stem)
def earlier(request) -> dict:
    return json.loads(request.param.read_text())


def test_a_config_of_an_earlier_commit_is_read_and_says_what_it_said(earlier):
    config = read_stored(RunConfig, {"config": earlier}, RUN)
    added = [line for line in differences(earlier, json.loads(config.to_json())) if "but was null" not in line]
    assert not added
    assert config.mesh.moments == "device"
    assert config.hang_minutes == 0
    assert all(stage.reinforcement is None or stage.value is None for stage in config.stages.values())


def test_a_run_of_an_earlier_commit_goes_on_with_what_came_later_as_it_was(earlier):
    config = read_stored(RunConfig, {"config": earlier}, RUN)
    assert not differences(stored_fields(RunConfig, {"config": earlier}, RUN), json.loads(config.to_json()))
    other = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, moments="host"))
    (line,) = differences(stored_fields(RunConfig, {"config": earlier}, RUN), json.loads(other.to_json()))
    assert line.startswith('config.mesh.moments is "host", but was "device"')


def test_a_model_of_an_earlier_commit_is_read(earlier):
    model = read_stored(ModelConfig, {"model": earlier["model"]}, RUN)
    assert model == read_stored(RunConfig, {"config": earlier}, RUN).model


def test_a_folder_of_an_earlier_commit_opens(tmp_path):
    folder, _ = saved_run.make_run(tmp_path, HybridLM)
    now = RunFolder.open(folder).run
    step = folder / "checkpoints" / "1"
    manifest = Manifest.read(step)
    metadata = json.loads(json.dumps(manifest.metadata))
    for section, name in (("mesh", "moments"), ("mesh", "gradient_dtype"), ("mesh", "expert_tensor")):
        del metadata["config"][section][name]
    dataclasses.replace(manifest, metadata={"config": metadata["config"]}).write(step)
    assert RunFolder.open(folder).run == now


def test_what_is_stored_is_read_back():
    config = read_stored(RunConfig, {"config": json.loads(EARLIER[0].read_text())}, RUN)
    assert read_stored(RunConfig, json.loads(json.dumps(to_store(config))), RUN) == config
    assert read_stored(ModelConfig, json.loads(json.dumps(to_store(config.model))), RUN) == config.model


def test_a_later_version_is_refused(earlier):
    with pytest.raises(StoredConfigError) as error:
        read_stored(RunConfig, {"config": earlier, "config_version": VERSION + 1}, RUN)
    assert str(error.value) == (
        f"runs/earlier: its config has version {VERSION + 1}, and this lightning_jax reads up to {VERSION}; update it, "
        "at least to the commit in its run.json"
    )


def test_a_field_that_is_unknown_or_missing_in_its_version_is_one_line(earlier):
    unknown = {**earlier, "mesh": {**earlier["mesh"], "shards": 2}}
    with pytest.raises(StoredConfigError, match=r"of version 1, .* has version 2: config.mesh.shards: no such field"):
        read_stored(RunConfig, {"config": unknown}, RUN)
    with pytest.raises(StoredConfigError, match=r"of version 2, .*missing .*\(and [0-9]+ more\); the commit"):
        read_stored(RunConfig, {"config": earlier, "config_version": 2}, RUN)
    with pytest.raises(StoredConfigError, match="config: None is not a section"):
        read_stored(RunConfig, {}, RUN)


def sections(schema) -> dict[type, list[str]]:
    """All that a config is made of, with their fields."""
    found, schema = {}, without_none(schema)
    if dataclasses.is_dataclass(schema):
        hints = typing.get_type_hints(schema)
        found[schema] = list(hints)
        inner = hints.values()
    else:
        inner = typing.get_args(schema) if typing.get_origin(schema) is dict else ()
    for each in inner:
        found |= sections(each)
    return found


def test_every_field_that_came_later_has_a_row():
    """Failing here? Begin a new version in CAME_WITH; the golden has what each section began with, and new sections."""
    began_with = json.loads((GOLDENS / "stored_config_fields.json").read_text())
    later = {}
    for rows in CAME_WITH.values():
        for section, fields in rows.items():
            later.setdefault(section.__name__, []).extend(fields)
    expected = {name: sorted(fields + later.get(name, [])) for name, fields in began_with.items()}
    assert {section.__name__: sorted(fields) for section, fields in sections(RunConfig).items()} == expected
    assert max(CAME_WITH) == stored_config.VERSION
