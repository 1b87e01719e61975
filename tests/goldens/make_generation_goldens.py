"""What transformers makes of logits before it samples, and of chats.

    python tests/goldens/make_generation_goldens.py        (torch 2.13, transformers 5.23.0, jinja2 3.1.6)

writes sampling.npz: `logits` [B, V], `seen` [B, T] (prompts), and for every setting of SETTINGS its scores after the
processors that `generate` builds for it, -inf where a token cannot be drawn; and chat_templates.json: templates in the
styles of ChatML, Llama 3, MiniMax-M1 and Tulu 3, the chats, and for each what `apply_chat_template` gives, as text and
as ids of the byte-level tokenizer that is written with them.
"""

import json
import pathlib

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = pathlib.Path(__file__).parent
SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
    "one_token": {"top_k": 1, "top_p": 0.01},
}

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"]
TEMPLATES = {
    "chatml": """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}""",
    "llama3": """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ (message.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "minimax_m1": """{{ '<begin_of_document>' -}}
{%- set assistant = 'ai name=assistant' -%}
{%- set names = {'system': 'system ai_setting=assistant', 'user': 'user name=user', 'assistant': assistant} -%}
{%- for message in messages -%}
{{ '<beginning_of_sentence>' ~ names[message.role] ~ '\\n' -}}
{%- if message.content is string -%}
{{ message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{{ '<end_of_sentence>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<beginning_of_sentence>' ~ assistant ~ '\\n' -}}
{%- endif -%}""",
    "tulu": """{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'system' %}\
{{ '<|system|>\\n' + content + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + content + '\\n' }}\
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + content + eos_token }}\
{% if not loop.last %}{{ '\\n' }}{% endif %}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "tools": """{% set state = namespace(calls=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% for call in message.tool_calls or [] %}
        {% set state.calls = state.calls + 1 %}
call {{ state.calls }}: {{ call | tojson }}
    {% else %}
{{ message.role | upper }}: {{ message.content }}
    {% endfor %}
    {% if state.calls >= 2 %}{% break %}{% endif %}
{% endfor %}
{{ messages | map(attribute='role') | unique | join(',') }}""",
}
CHATS = {
    "question": [{"role": "user", "content": "How far is the moon?"}],
    "turns": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  Größe & <b>naïve</b> 'quotes'\n\nsecond line \n"},
        {"role": "assistant", "content": "Nein."},
        {"role": "user", "content": "日本語 🙂"},
    ],
    "answered": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}],
}
CALL = {"name": "add", "arguments": {"a": 1, "text": 'é < "b"'}}
ONLY = {
    "tools": {
        "calls": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "", "tool_calls": [CALL] * 3}]
    },
    "minimax_m1": {"parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
}


def sampling() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, 48)).astype(np.float32)
    logits[0, 7] = logits[0, 31]  # a tie, which no border cuts here
    seen = rng.integers(0, 48, (4, 9))
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=48, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    arrays = {"logits": logits, "seen": seen}
    for name, setting in SETTINGS.items():
        config = GenerationConfig(do_sample=True, **({"top_k": 0} | setting))
        processors = model._get_logits_processor(config, input_ids_seq_length=9, device="cpu")
        arrays[f"scores/{name}"] = processors(torch.tensor(seen), torch.tensor(logits)).numpy()
        print(name, [type(each).__name__ for each in processors])
    np.savez_compressed(FOLDER / "sampling.npz", settings=json.dumps(SETTINGS), **arrays)


def chat_templates() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(json.dumps(CHATS, ensure_ascii=False).split(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    cases = []
    for name, template in TEMPLATES.items():
        for title, chat in (CHATS | ONLY.get(name, {})).items():
            for prompt in (True, False):
                options = {"chat_template": template, "add_generation_prompt": prompt}
                cases.append(
                    {
                        "template": name,
                        "chat": title,
                        "messages": chat,
                        "add_generation_prompt": prompt,
                        "text": tokenizer.apply_chat_template(chat, tokenize=False, **options),
                        "ids": tokenizer.apply_chat_template(chat, return_dict=False, **options),
                    }
                )
    golden = {"templates": TEMPLATES, "tokenizer": json.loads(backend.to_str()), "cases": cases}
    path = FOLDER / "chat_templates.json"
    path.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sampling()
    chat_templates()
