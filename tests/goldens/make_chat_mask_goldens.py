"""Chats as transformers tokenizes them, and which tokens it says the assistant wrote.

    python tests/goldens/make_chat_mask_goldens.py        (transformers 5.23.0, jinja2 3.1.6, tokenizers 0.22)

writes chat_masks.json: a byte-level tokenizer, and for each of six templates and each chat the ids and the assistant
mask of `apply_chat_template(..., return_assistant_tokens_mask=True)`. Four are our named templates. Two come without
`{% generation %}`, as most do: transformers sees a twin of each with the tag, whose text is the same.
"""

import ast
import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = pathlib.Path(__file__).parent
NAMED = FOLDER.parents[1] / "lightning_jax" / "input_pipeline" / "chat_templates.py"
BEGIN, END = "{% generation %}", "{% endgeneration %}"

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"]
TWINS = {
    "zephyr": r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' }}BEGIN{{ message['content'] + eos_token }}END{{ '\n' -}}
{% else %}
{{ raise_exception('no role ' ~ message['role']) }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>\n' -}}
{% endif %}
{% endfor %}""",
    "tools": r"""{%- if tools %}
{{- '<|im_start|>system\n' }}{{- messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' }}
{{- '# Tools' }}{%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}BEGIN{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}
{%- endfor %}{{- '<|im_end|>' }}END{{- '\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>' ~ message.content ~ '</tool_response><|im_end|>\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
}
CHATS = {
    "one turn": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}],
    "turns": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  Größe & <b>naïve</b> 'quotes'\n\nsecond line \n"},
        {"role": "assistant", "content": "Nein."},
        {"role": "user", "content": "日本語 🙂"},
        {"role": "assistant", "content": "  はい 🙂 "},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "that's all\n"},
    ],
    "empty answer": [{"role": "user", "content": "say nothing"}, {"role": "assistant", "content": ""}],
    "unanswered": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": "int", "naïve": "<b>"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "text": 'é < "b"'}}}
CALLING = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]


def named_templates() -> dict[str, str]:
    """Read from the source: the package itself needs jax, which transformers' environment may not have."""
    constants = {}
    for node in ast.parse(NAMED.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants[node.targets[0].id.lower()] = node.value.value
    return constants


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(json.dumps([CHATS, CALLING], ensure_ascii=False).split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def main() -> None:
    tokenizer = make_tokenizer()
    named = named_templates()
    templates = named | {name: text.replace("BEGIN", "").replace("END", "") for name, text in TWINS.items()}
    tagged = named | {name: text.replace("BEGIN", BEGIN).replace("END", END) for name, text in TWINS.items()}
    cases = []
    for name, template in tagged.items():
        chats = [(chat, None) for chat in CHATS.values()]
        if name != "zephyr":  # it knows no role for what a tool says
            chats.append((CALLING, [TOOL]))
        for chat, tools in chats:
            encoded = tokenizer.apply_chat_template(
                chat, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            text, plain = (
                tokenizer.apply_chat_template(chat, tools=tools, chat_template=each, tokenize=False)
                for each in (template, templates[name])
            )
            assert text == plain
            mask = encoded["assistant_masks"]
            cases.append(
                {"template": name, "messages": chat, "tools": tools, "ids": encoded["input_ids"], "mask": mask}
            )
    golden = {
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
        "templates": {name: templates[name] for name in TWINS},
        "cases": cases,
    }
    (FOLDER / "chat_masks.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
