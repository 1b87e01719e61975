"""Chat templates by name, each with the assistant's words between {% generation %} tags, and a tokenizer's own.

Sources: ChatML as SmolLM2's released tokenizers write it, without their default system prompt; the template "tulu" of
Tulu 3 (arXiv 2411.15124); those in the released tokenizers of MiniMax-M1 and Llama 3.
"""

import json
from pathlib import Path

from lightning_jax.input_pipeline.chat_template import ChatTemplateError
from lightning_jax.input_pipeline.config import DataConfig

CHATML = r"""{% for message in messages %}
{{ '<|im_start|>' ~ message.role ~ '\n' -}}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\n' -}}
{% else %}
{{ message.content ~ '<|im_end|>\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' -}}
{% endif %}"""

TULU = r"""{% for message in messages %}
{% if message.role == 'assistant' %}
{{ '<|assistant|>\n' -}}
{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}
{% if not loop.last %}
{{ '\n' -}}
{% endif %}
{% else %}
{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ '\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' -}}
{% endif %}"""

MINIMAX_M1 = r"""{{ '<begin_of_document>' -}}
{% set roles = {'system': 'system ai_setting=assistant', 'user': 'user name=user', 'assistant': 'ai name=assistant',
                'tool': 'tool name=tools'} %}
{% for message in messages %}
{{ '<beginning_of_sentence>' ~ roles[message.role] ~ '\n' -}}
{% if message.content is string %}
{% set content = message.content %}
{% else %}
{% set content = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}
{% endif %}
{% if message.role == 'assistant' %}
{% generation %}{{ content ~ '<end_of_sentence>' }}{% endgeneration %}{{ '\n' -}}
{% else %}
{{ content ~ '<end_of_sentence>\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<beginning_of_sentence>ai name=assistant\n' -}}
{% endif %}"""

LLAMA3 = r"""{{ bos_token -}}
{% for message in messages %}
{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' -}}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content | trim ~ '<|eot_id|>' }}{% endgeneration %}
{% else %}
{{ message.content | trim ~ '<|eot_id|>' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{% endif %}"""

TEMPLATES = {"chatml": CHATML, "tulu": TULU, "minimax_m1": MINIMAX_M1, "llama3": LLAMA3}


def open_template(config: DataConfig) -> str | None:
    """The chat template that the config asks for; None where it names none and the tokenizer brings none.

    Raises:
      ChatTemplateError: the file that it names cannot be read.
    """
    named = config.chat_template
    if named in TEMPLATES:
        return TEMPLATES[named]
    if named:
        try:
            return Path(named).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ChatTemplateError(
                f"data.chat_template: {named}: {why}; name a file of Jinja, or one of {', '.join(TEMPLATES)}"
            ) from None
    if config.tokenizer.kind != "file":
        return None
    folder = Path(config.tokenizer.path).expanduser().parent
    try:
        if (path := folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ChatTemplateError(f"{path}: {error}") from None
    return template if isinstance(template, str) else None


def template_tokens(config: DataConfig) -> dict[str, str]:
    """The special tokens that a template reads by name."""
    return {"bos_token": config.tokenizer.bos, "eos_token": config.tokenizer.eos}
