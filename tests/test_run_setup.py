"""What a run says before its first step: which kernel computes lightning attention, and what its chats lack."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from flax import nnx
from tiny_model import tiny_model

from lightning_jax.config_reader import load_config
from lightning_jax.models import HybridLM
from lightning_jax.run_setup import describe, open_data
from lightning_jax.stages import plan_stages
from pallas_kernels.tpu import attention as tpu


def header(*overrides: str) -> dict[str, str | list[str]]:
    config = load_config(tiny_run.CONFIG, overrides)
    return describe(config, plan_stages(config), pathlib.Path("runs/any"))


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(tpu, "generation", lambda: "v5e")


def test_without_an_accelerator_it_is_the_portable_form():
    assert header()["lightning"] == "xla: no kernel for cpu; the portable form runs everywhere"


@pytest.mark.usefixtures("on_a_tpu")
def test_on_a_tpu_it_is_the_kernel_or_why_not():
    assert header("model.head_dim=64")["lightning"] == "pallas_tpu: the kernel for TPU v5e"
    assert "head dims 64, 96, 128, 256, not 32" in header("model.head_dim=32", "model.rotary_dim=16")["lightning"]


def test_what_a_config_names_is_taken():
    assert header("model.lightning_implementation=reference")["lightning"] == "reference: as the config says"


def test_a_model_without_lightning_attention_says_nothing_of_it():
    config = load_config(tiny_run.CONFIG.replace(":laptop", ":laptop_softmax"))
    assert "lightning" not in describe(config, plan_stages(config), pathlib.Path("runs/any"))


@pytest.mark.parametrize("accelerator", [True, False])
def test_the_model_is_traced_with_the_kernel_that_is_said(accelerator, request):
    if accelerator:
        request.getfixturevalue("on_a_tpu")
    config = tiny_model(layer_pattern=("lightning",), num_layers=1, num_heads=2, head_dim=64, num_experts=0)
    model = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)

    def loss(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens)[0].sum()

    tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    program = str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(parameters, tokens))
    for direction in ("forward", "backward"):
        assert (f"lightning_attention_{direction}" in program) == accelerator


@pytest.mark.parametrize(("template", "said"), [("chatml", True), ("tulu", False)])
def test_a_template_that_ends_turns_in_text_is_said(template, said, tmp_path):
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 3)
    overrides = {
        "model.vocab_size": 257,
        "run_stages": "sft",
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.vocab_size": 257,
        "data.corpora.arithmetic.format": "jsonl",
        "data.corpora.arithmetic.path": tmp_path / "chats.jsonl",
        "data.chat_template": template,
        "data.cache_dir": tmp_path / "cache",
    }
    config = load_config("configs/tulu3.py:laptop", [f"{name}={value}" for name, value in overrides.items()])
    lines: list[str] = []
    open_data(config, lines.append)
    assert any("the assistant's turn ends with no special token" in line for line in lines) == said
