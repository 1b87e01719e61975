"""What belongs to a Hugging Face checkpoint besides its weights: the tokenizer's files, as a conversion writes them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_jax.model_folders import TEXT_FILES, Texts, chat_template_in, read_json


def padding_token(texts: Texts) -> int | None:
    """The token that transformers takes for padding behind a chat; not an end, which it would then score without."""
    known = texts.tokenizer.special_tokens if texts.tokenizer else {}
    padding = known.get(texts.special_tokens.get("pad_token", ""))
    return None if padding in texts.eos_ids else padding


def copy_texts(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_texts(texts: Texts, folder: Path, fields: dict[str, Any]) -> None:
    """The tokenizer's files as they came, or made of the run's own tokenizer, and what training has added to them."""
    if texts.folder is not None:
        copy_texts(texts.folder, folder)
    else:
        texts.tokenizer.save(folder / "tokenizer.json")
    if texts.special_tokens and not (path := folder / "tokenizer_config.json").exists():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(path, settings | texts.special_tokens)
    if texts.chat_template and texts.chat_template != chat_template_in(folder):
        (folder / "chat_template.jinja").write_text(texts.chat_template, encoding="utf-8")
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id") if fields.get(name) is not None}
    settings = ids | read_json(folder / "generation_config.json")
    ends = settings.get("eos_token_id")
    if missing := [end for end in texts.eos_ids if end not in (ends if isinstance(ends, list) else [ends])]:
        settings["eos_token_id"] = [*texts.eos_ids] if len(texts.eos_ids) > 1 else missing[0]
    if missing or not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", settings)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
