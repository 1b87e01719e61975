"""What lies in the folder of a trained model, be it a run of ours or a Hugging Face checkpoint; reads no weights."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

from lightning_jax.checkpoints import Manifest, newest_manifest
from lightning_jax.checkpoints.manifest import DamagedError
from lightning_jax.checkpoints.restoring import committed_steps, read_manifest
from lightning_jax.checkpoints.safetensors_folder import Tensor, check_place, open_folder
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import Tokenizer, prepare_tokenizer
from lightning_jax.input_pipeline.chat_masks import end_of_turn
from lightning_jax.input_pipeline.chat_templates import open_template, template_tokens
from lightning_jax.input_pipeline.tokenizers import FileTokenizer
from lightning_jax.models import ModelConfig
from lightning_jax.models import hugging_face as names
from lightning_jax.models.config import LoraConfig
from lightning_jax.models.hugging_face_config import HuggingFaceError, read_config
from lightning_jax.stages import plan_stages
from lightning_jax.stored_config import read_stored

# In a run's folder; the second where it was imported, the third where it trains adapters: what they belong to.
CHECKPOINTS, ORIGINAL, BASE = "checkpoints", "hugging_face", "base"
CONFIG = "config.json"
# All that belongs to a Hugging Face checkpoint besides weights and config. Code does not come along.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
Dtype = Literal["float32", "bfloat16"]


class ModelFolderError(UserError):
    """A folder that holds no model, or one that does not fit together; a line for every reason."""


@dataclass(frozen=True)
class Texts:
    """How a model's tokens are text.

    Attributes:
        folder: has the files of `TEXT_FILES`, as far as they exist; None for a model without any.
        special_tokens: by the names that chat templates know: bos_token, eos_token, ...
        eos_ids: any of them ends what the model generates.
    """

    tokenizer: Tokenizer | None
    folder: Path | None
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A Hugging Face checkpoint whose tensors are those of its config, each of the right shape."""

    path: Path
    fields: dict[str, Any]  # config.json
    config: ModelConfig
    tensors: dict[str, Tensor]
    pieces: list[names.Piece]

    @classmethod
    def open(cls, path: Path, *, dtype: Dtype | None = None) -> "HuggingFaceFolder":
        """Reads and checks config, index and headers.

        Args:
            dtype: to hold the weights in; None for the files' own, where float16 widens to float32.

        Raises:
            UserError: a line for everything that is wrong.
        """
        if not (path / CONFIG).exists():
            raise ModelFolderError(f"{path / CONFIG}: missing; it says what the weights are")
        for name in (CONFIG, *TEXT_FILES):
            if (path / name).exists():
                check_place(path, name)
        fields = read_json(path / CONFIG)
        try:
            config = read_config(fields, dtype or "float32")
        except HuggingFaceError as error:
            raise ModelFolderError("\n".join(f"{path}/{line}" for line in str(error).splitlines())) from None
        tensors = open_folder(path)
        if config.tie_embeddings:
            tensors.pop("lm_head.weight", None)  # a copy of the embedding, which some files have
        pieces = names.pieces(config, names.feed_forward_names(config, tensors))
        if wrong := names.differences(pieces, {name: tensor.shape for name, tensor in tensors.items()}):
            raise ModelFolderError("\n".join(f"{path}: {line}" for line in wrong))
        if dtype is None:
            widest = {tensors[piece.tensor].dtype for piece in pieces if not piece.is_router}
            if all(each.name == "bfloat16" for each in widest):
                config = dataclasses.replace(config, param_dtype="bfloat16", compute_dtype="bfloat16")
        return cls(path, fields, config, tensors, pieces)

    @property
    def context_length(self) -> int | None:
        return self.fields.get("max_position_embeddings")

    @property
    def router_dtype(self) -> Dtype:
        """In which the routers' weights are there; ours are always float32."""
        narrow = any(p.is_router and self.tensors[p.tensor].dtype.name == "bfloat16" for p in self.pieces)
        return "bfloat16" if narrow else "float32"


@dataclass(frozen=True)
class RunFolder:
    """A run of ours, or an imported model, and its newest checkpoint whose files are whole."""

    path: Path
    manifest: Manifest
    run: RunConfig | None  # None where it was imported

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Raises UserError where there is no checkpoint, or one that this version of the package cannot read."""
        manifest = newest_manifest(path / CHECKPOINTS)
        if manifest is None:
            raise ModelFolderError("\n".join(_rejected(path)))
        if "model" in manifest.metadata:
            return cls(path, manifest, None)
        return cls(path, manifest, read_stored(RunConfig, manifest.metadata, path))

    def config(self, step: int | None = None) -> ModelConfig:
        """The model as it was trained at a step, the newest if not given: with the rotary base of that stage."""
        if self.run is None:
            return read_stored(ModelConfig, self.manifest.metadata, self.path)
        return dataclasses.replace(self.run.model, rope_theta=self._stage(step).rope_theta)

    @property
    def is_reward_model(self) -> bool:
        """Whether it has a head that scores in place of a vocabulary."""
        return self.run is not None and self.run.stages[self.run.run_stages[0]].objective == "reward_model"

    @property
    def adapters(self) -> LoraConfig | None:
        """That its checkpoints hold in place of weights."""
        return self.run and self.run.lora

    @property
    def context_length(self) -> int | None:
        return self.manifest.metadata.get("context_length") if self.run is None else self._stage(None).context_length

    @property
    def fields(self) -> dict[str, Any]:
        """The config.json that it was imported with; empty for a run of ours."""
        return read_json(self.path / ORIGINAL / CONFIG)

    def _stage(self, step: int | None) -> Any:
        step = self.manifest.step if step is None else step
        stages = plan_stages(self.run)
        return next((stage for stage in stages if step <= stage.last_step), stages[-1]).config


def _rejected(path: Path) -> Iterator[str]:
    """Why a run's folder has no checkpoint, a line for each that is damaged."""
    for step in sorted(committed_steps(path / CHECKPOINTS)):
        try:
            read_manifest(path / CHECKPOINTS, step)
        except DamagedError as damage:
            yield f"{path}: checkpoint {step} cannot be used: {damage}"
    yield f"{path}: there is no whole checkpoint in {path / CHECKPOINTS}"


def open_model_folder(path: Path, *, dtype: Dtype | None = None) -> HuggingFaceFolder | RunFolder:
    """Whichever it is. Raises UserError where it is neither, or damaged."""
    if not path.is_dir():
        raise ModelFolderError(f"{path}: no such folder")
    if (path / CHECKPOINTS).is_dir():
        return RunFolder.open(path)
    if (path / CONFIG).is_file() or any(path.glob("*.safetensors*")) or any(path.glob("*.bin")):
        return HuggingFaceFolder.open(path, dtype=dtype)
    raise ModelFolderError(
        f"{path}: neither a run ({CHECKPOINTS}/) nor a Hugging Face folder ({CONFIG}, *.safetensors)"
    )


def read_texts(folder: HuggingFaceFolder | RunFolder, vocab_size: int) -> Texts:
    """The tokenizer and what goes with it.

    Raises:
        UserError: a file is damaged, or the tokenizer has more tokens than the model.
    """
    if isinstance(folder, HuggingFaceFolder):
        texts = _read_text_files(folder.path, folder.fields)
    elif folder.run is None:
        texts = _read_text_files(folder.path / ORIGINAL, folder.fields)
    else:
        texts = _texts_of_run(folder.run)
    if texts.tokenizer and texts.tokenizer.vocab_size > vocab_size:
        raise ModelFolderError(
            f"{folder.path}: the tokenizer has {texts.tokenizer.vocab_size:,} tokens, more than the model's "
            f"vocab_size={vocab_size:,}; they do not belong together"
        )
    if outside := [token for token in texts.eos_ids if not 0 <= token < vocab_size]:
        raise ModelFolderError(f"{folder.path}: eos_token_id {outside[0]} is not in the vocabulary of {vocab_size:,}")
    return texts


def _texts_of_run(run: RunConfig) -> Texts:
    """The tokenizer that the run was trained with; where its file has neighbours, what these say besides."""
    tokenizer = prepare_tokenizer(run.data)
    beside = Texts(tokenizer, None, None, {}, ())
    if run.data.tokenizer.kind == "file":
        beside = _read_text_files(Path(run.data.tokenizer.path).expanduser().parent, {})
    template = open_template(run.data) or beside.chat_template
    tokens = beside.special_tokens | {name: token for name, token in template_tokens(run.data).items() if token}
    ends = dict.fromkeys((*beside.eos_ids, tokenizer.eos_id, end_of_turn(run.data, tokenizer)))
    return Texts(tokenizer, beside.folder, template, tokens, tuple(end for end in ends if end is not None))


def _read_text_files(folder: Path, fields: Mapping[str, Any]) -> Texts:
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    special = {name: _token(settings.get(name)) for name in SPECIAL_TOKENS}
    special = {name: token for name, token in special.items() if token}
    tokenizer = None
    if (path := folder / "tokenizer.json").is_file():
        tokenizer = FileTokenizer.open(path, bos="", eos="")
        eos = special.get("eos_token", "")
        eos = eos if eos in tokenizer.special_tokens else ""
        tokenizer = FileTokenizer.open(path, bos=_first_token(path), eos=eos)
    generation = read_json(folder / "generation_config.json")
    ends = generation.get("eos_token_id", fields.get("eos_token_id"))
    ends = [token for token in (ends if isinstance(ends, list) else [ends]) if token is not None]
    if wrong := [token for token in ends if type(token) is not int]:
        raise ModelFolderError(f"{folder}: eos_token_id {wrong[0]!r} is no token id")
    return Texts(tokenizer, folder, chat_template_in(folder), special, tuple(ends))


def _first_token(path: Path) -> str:
    """The token that a tokenizer's own post-processor puts before every text; "" for none."""
    backend = Backend.from_file(str(path))
    text, processed = (backend.encode("a", add_special_tokens=special) for special in (False, True))
    return processed.tokens[0] if processed.tokens[:1] != text.tokens[:1] else ""


def chat_template_in(folder: Path) -> str | None:
    """The chat template among the text files of a folder."""
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError:
            raise ModelFolderError(f"{path}: not UTF-8 text") from None
    settings = read_json(folder / "tokenizer_config.json") | read_json(folder / "chat_template.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token(value: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: a string, or an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises ModelFolderError where it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ModelFolderError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: not a JSON object")
    return value
