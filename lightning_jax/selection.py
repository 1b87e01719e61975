"""Which size of a config to take: what its argument names, or the largest that fits the machine."""

import glob
from collections.abc import Callable, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from lightning_jax.config import ConfigError, ModelConfig, nearest_name
from lightning_jax.config_reader import parse
from lightning_jax.errors import UserError

# Share of the devices' memory that weights, moments and gradients may take; the rest is for activations, the logits of
# one chunk and what the compiler keeps.
STATE_SHARE = 0.7


def select(
    argument: str, sizes: Sequence[str], recipes: Sequence[str], build: Callable[[str, str], ConfigDict]
) -> ConfigDict:
    """The config that `argument` names: a size, a recipe, or both as "size,recipe", in any order.

    Without a recipe it is the first of `recipes`; without a size the largest of `sizes`, which are listed from the
    smallest up, that fits this machine. Raises UserError for a name that is neither.
    """
    names = [name for name in argument.split(",") if name]
    for name in names:
        if name not in (*sizes, *recipes):
            raise UserError(f"{name!r} is neither a size nor a recipe; {nearest_name(name, (*sizes, *recipes))}")
    asked_sizes = [name for name in names if name in sizes]
    asked_recipes = [name for name in names if name in recipes]
    for kind, asked in (("size", asked_sizes), ("recipe", asked_recipes)):
        if len(asked) > 1:
            raise UserError(f"{argument!r} names more than one {kind}; take one of {', '.join(asked)}")
    (recipe,) = asked_recipes or recipes[:1]
    if asked_sizes:
        size, reason = asked_sizes[0], f"{asked_sizes[0]}: asked for"
    else:
        size, reason = largest_fitting({size: build(size, recipe) for size in sizes}, jax.devices())
    config = build(size, recipe)
    config.size_reason = reason
    return config


def largest_fitting(configs: Mapping[str, ConfigDict], devices: Sequence[jax.Device]) -> tuple[str, str]:
    """The last of `configs`, from the smallest up, that fits the devices and whose data are here, and why in one line.

    Weights, Adam's moments and gradients, on each device or split over all, may take STATE_SHARE of the memory.
    Devices that do not tell their memory, as CPUs, take "laptop". Raises UserError where nothing fits.
    """
    local = next(device for device in devices if device.process_index == jax.process_index())
    machine = f"{len(devices)} x {local.device_kind}"
    limit = (local.memory_stats() or {}).get("bytes_limit")
    if local.platform == "cpu" or limit is None:
        return "laptop", f"laptop: {machine}, no accelerator"
    obstacles = {name: _obstacle(config, limit, len(devices)) for name, config in configs.items()}
    fitting = [name for name, obstacle in obstacles.items() if not obstacle]
    if not fitting:
        raise UserError(f"no size fits {machine}: " + "; ".join(f"{name} {why}" for name, why in obstacles.items()))
    larger = list(configs)[list(configs).index(fitting[-1]) + 1 :]
    reason = f"{fitting[-1]}: the largest for {machine} of {limit / 2**30:.0f} GiB"
    return fitting[-1], "; ".join([reason, *(f"{name} {obstacles[name]}" for name in larger)])


def training_bytes(config: ConfigDict) -> int:
    """Bytes of weights, gradients and Adam's moments; those of adapters are too few to count."""
    model, problems = parse(ModelConfig, config.model)
    if problems:
        raise ConfigError(problems)
    if config.lora:
        return model.weight_bytes(model.param_dtype)
    moments = max(model.optimizer_bytes(stage.optimizer.moment_dtype) for stage in config.stages.values())
    return 2 * model.weight_bytes(model.param_dtype) + moments


def _obstacle(config: ConfigDict, limit: int, num_devices: int) -> str:
    """What keeps `config` from so many devices of `limit` bytes each, "" for nothing."""
    needed = training_bytes(config)
    if needed > STATE_SHARE * limit * (1 if config.mesh.data == -1 else num_devices):
        return f"needs {needed / 2**30:.0f} GiB for weights, moments and gradients"
    wanted = {name for stage in config.run_stages for name in config.stages[stage].mixture.start}
    corpora = [config.data.corpora[name] for name in sorted(wanted)]
    paths = [corpus.path for corpus in corpora if corpus.format not in ("embedded", "generated")]
    missing = [path for path in [*paths, config.data.tokenizer.path] if path and not glob.glob(path)]
    return f"needs {missing[0]}, which is not here" if missing else ""
