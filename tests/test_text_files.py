"""An exported chat model ends its turns and writes its chats as it was trained to, whatever its tokenizer came with."""

import json

import pytest
from saved_run import make_run
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lightning_jax import convert
from lightning_jax.input_pipeline.chat_templates import TEMPLATES
from lightning_jax.models import HybridLM
from lightning_jax.trained_model import load_model

EOS, END_OF_TURN = "<|endoftext|>", "<|im_end|>"


@pytest.fixture
def run(tmp_path):
    """A run that was fine-tuned on ChatML with the tokenizer.json of a base model, which knows of no chats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (EOS, "<|im_start|>", END_OF_TURN)])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    overrides = {
        "model.vocab_size": 260,
        "data.tokenizer.kind": "file",
        "data.tokenizer.path": tmp_path / "tokenizer" / "tokenizer.json",
        "data.tokenizer.vocab_size": 260,
        "data.tokenizer.eos": EOS,
        "data.chat_template": "chatml",
    }
    folder, _ = make_run(tmp_path, HybridLM, tuple(f"{name}={value}" for name, value in overrides.items()))
    return folder


def test_a_chat_model_ends_at_the_end_of_a_turn_too(run):
    model = load_model(run, say=print)
    special = model.tokenizer.special_tokens
    assert model.eos_ids == (special[EOS], special[END_OF_TURN])
    assert model.chat_template == TEMPLATES["chatml"]
    assert model.special_tokens == {"eos_token": EOS}


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 256, "temperature": 0.6}])
def test_its_export_says_so(run, tmp_path, generation):
    if generation:
        (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps(generation))
    assert convert.main([f"--from={run}", f"--to={tmp_path / 'exported'}"]) == 0
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert written == (generation or {}) | {"eos_token_id": [256, 258]}
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    settings = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == EOS
    again = load_model(tmp_path / "exported", say=print)
    assert again.eos_ids == (256, 258)
    assert again.chat_template == TEMPLATES["chatml"]
