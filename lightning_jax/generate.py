"""Text from a trained model: a run of ours, or a Hugging Face folder.

    python -m lightning_jax.generate --from=runs/tinyllama --prompt="Once upon a time"
    python -m lightning_jax.generate --from=runs/m1 --chat --prompts=questions.jsonl --samples=4 --out=answers.jsonl

One prompt is answered on the console while its text comes. Prompts in a file are lines of JSON, {"prompt": "..."} or,
with --chat, also {"messages": [{"role": "user", "content": "..."}]}; without either, each line of standard input is a
prompt. With --out every completion is a line of JSON, written as soon as it is finished: Ctrl-C keeps those.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from lightning_jax import parallel
from lightning_jax.command_line import USAGE_ERROR, mesh_option
from lightning_jax.errors import UserError
from lightning_jax.generation import Completion, GenerationSettings, Generator, Sampling, Speed
from lightning_jax.input_pipeline import encode
from lightning_jax.input_pipeline.chat_template import encode_chats
from lightning_jax.trained_model import TrainedModel, load_model

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a chat

STOPPED = 130  # the exit code of what Ctrl-C ended
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_tokens")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_jax.generate", description="Generates text with a trained model."
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="PATH", help="a run's folder, or a Hugging Face folder")
    add("--prompt", metavar="TEXT", help="one prompt")
    add("--prompts", metavar="FILE.jsonl", type=pathlib.Path, help="a prompt in each line")
    add("--chat", action="store_true", help="prompts are what a user says, in the model's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system's message")
    add("--max_new_tokens", type=int, default=256, help="of each completion")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    add("--top_k", type=int, default=0, help="only the k likeliest tokens")
    add("--top_p", type=float, default=1.0, help="only the likeliest tokens that have this probability together")
    add("--min_p", type=float, default=0.0, help="only tokens with this fraction of the likeliest one's probability")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: tokens that were there become less likely")
    add("--repetition_tokens", type=int, default=0, help="end after so many tokens in a row that were nearly certain")
    add("--stop", metavar="TEXT", action="append", default=[], help="ends a completion; may be given several times")
    add("--stop_token", metavar="TOKEN", action="append", default=[], help="a special token that ends a completion")
    add("--samples", type=int, default=1, help="completions of each prompt")
    add("--seed", type=int, default=0, help="the same seed gives the same completions")
    add("--slots", type=int, default=8, help="sequences generated together")
    add("--capacity", type=int, help="most tokens of prompt and completion; what the longest needs if not given")
    add("--compute_dtype", choices=("float32", "bfloat16"), help="instead of the model's own")
    add("--mesh", default="", metavar="AXIS=DEVICES,...", help="data, fsdp, expert, tensor; one may be -1")
    add("--out", type=pathlib.Path, metavar="FILE.jsonl", help="write completions there")
    add("--log_probs", action="store_true", help="with --out: token ids and their log-probabilities too")
    return parser.parse_args(arguments)


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts, from wherever they were to come.

    Raises:
        UserError: a line for each mistake.
    """
    if options.prompt is not None:
        return [options.prompt]
    if options.prompts is None:
        return [line.rstrip("\n") for line in sys.stdin]
    try:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--prompts={options.prompts}: {why}") from None
    prompts: list[Prompt] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        with contextlib.suppress(json.JSONDecodeError):
            match json.loads(line):
                case {"prompt": str(text)}:
                    prompts.append(text)
                    continue
                case {"messages": [{"role": str()}, *_] as messages} if options.chat:
                    prompts.append(messages)
                    continue
        wanted = '{"prompt": "..."} or {"messages": [...]}' if options.chat else '{"prompt": "..."}'
        problems.append(f"--prompts={options.prompts}: line {number} is not {wanted}")
    if problems:
        raise UserError("\n".join(problems))
    return prompts


def encode_prompts(options: argparse.Namespace, model: TrainedModel, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """The tokens of each prompt: the beginning of a document, or a chat up to the assistant's turn.

    Raises:
        UserError: a line for each mistake.
    """
    if problems := [f"prompt {number}: it is empty" for number, prompt in enumerate(prompts) if not prompt]:
        raise UserError("\n".join(problems))
    if not options.chat:
        bos = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
        return [np.array([*bos, *encode(model.tokenizer, prompt)], np.int32) for prompt in prompts]
    if model.chat_template is None:
        raise UserError(f"--chat: {options.source} has no chat template; leave --chat out, or take a chat model")
    system = [{"role": "system", "content": options.system}] if options.system else []
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return encode_chats(
        model.tokenizer,
        model.chat_template,
        [[*system, *chat] for chat in chats],
        special_tokens=model.special_tokens,
        add_generation_prompt=True,
    )


def make_sampling(options: argparse.Namespace, model: TrainedModel) -> Sampling:
    """How to sample, ending at the model's eos.

    Raises:
        UserError: a token that the model does not have.
    """
    special = model.tokenizer.special_tokens
    if unknown := [token for token in options.stop_token if token not in special]:
        known = ", ".join(special) or "none"
        raise UserError(
            "\n".join(f"--stop_token={token}: no special token of the model; known: {known}" for token in unknown)
        )
    eos = () if model.tokenizer.eos_id is None else (model.tokenizer.eos_id,)
    stop_ids = dict.fromkeys((*model.eos_ids, *eos, *(special[token] for token in options.stop_token)))
    return Sampling(
        **{name: getattr(options, name) for name in SAMPLING},
        stop=tuple(options.stop),
        stop_ids=tuple(stop_ids),
        samples=options.samples,
        seed=options.seed,
    )


def check_options(options: argparse.Namespace) -> parallel.MeshConfig | None:
    """What can be known to be wrong before a model is loaded; the mesh that was asked for.

    Raises:
        UserError: a line for each mistake.
    """
    sampling = Sampling(**{name: getattr(options, name) for name in (*SAMPLING, "samples")}, stop=tuple(options.stop))
    problems = [f"--{problem}" for problem in sampling.problems()]
    problems += [
        f"--{name}: {getattr(options, name)} is not positive"
        for name in ("slots", "capacity")
        if getattr(options, name) is not None and getattr(options, name) < 1
    ]
    if options.prompt is not None and options.prompts is not None:
        problems.append("--prompts: there is a --prompt too; give one of them")
    if options.system is not None and not options.chat:
        problems.append("--system: it needs --chat")
    if options.log_probs and not options.out:
        problems.append("--log_probs: they are written with --out only")
    mesh = mesh_option(options.mesh, problems)
    if problems:
        raise UserError("\n".join(problems))
    return mesh


def generate(options: argparse.Namespace) -> int:
    """All of the command; returns its exit code.

    Raises:
        UserError: something that the user has to change; one line for each.
    """
    mesh = check_options(options)
    prompts = read_prompts(options)
    model = load_model(options.source, mesh=mesh, compute_dtype=options.compute_dtype, say=_say)
    if model.tokenizer is None:
        raise UserError(f"--from={options.source}: there is no tokenizer in it, and prompts are text")
    sampling = make_sampling(options, model)
    tokens = encode_prompts(options, model, prompts)
    generator = make_generator(options, model, tokens)
    if problems := list(filter(None, (generator.problem(n, ids, sampling) for n, ids in enumerate(tokens)))):
        raise UserError("\n".join(problems))

    wanted = len(tokens) * options.samples
    streaming = wanted == 1 and not options.out
    on_text = (lambda prompt, sample, text: print(text, end="", flush=True)) if streaming else None
    done, exit_code = 0, 0
    with _open(options.out) as file:
        try:
            for completion in generator.generate(tokens, sampling, on_text=on_text):
                _show(completion, file, options, streaming=streaming)
                done += 1
        except KeyboardInterrupt:
            exit_code = STOPPED
    kept = f"; they are in {options.out}" if options.out else ""
    _say(("stopped: " if exit_code else "") + f"{done} of {wanted} completions{kept}; {_speed(generator.speed)}")
    return exit_code


def make_generator(options: argparse.Namespace, model: TrainedModel, tokens: Sequence[np.ndarray]) -> Generator:
    """With room for the longest prompt and its completion, and no more slots than there will be sequences."""
    longest = max(map(len, tokens), default=0) + options.max_new_tokens
    if model.context_length and longest > model.context_length:
        _say(f"up to {longest:,} tokens: longer than the {model.context_length:,} that the model was trained on")
    shards = parallel.batch_shards(model.mesh)
    slots = min(options.slots, max(len(tokens) * options.samples, 1))
    settings = GenerationSettings(slots=-(-slots // shards) * shards, capacity=options.capacity or longest)
    return Generator(model.config, model.params, settings, mesh=model.mesh, tokenizer=model.tokenizer)


def _open(path: pathlib.Path | None) -> contextlib.AbstractContextManager[TextIO | None]:
    if path is None:
        return contextlib.nullcontext()
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror}") from None


def _show(completion: Completion, file: TextIO | None, options: argparse.Namespace, *, streaming: bool) -> None:
    if streaming:
        print(flush=True)
    elif file is None:
        print(f"--- prompt {completion.prompt}, sample {completion.sample} ({completion.finish_reason})")
        print(completion.text, flush=True)
    else:
        record = {
            "prompt": completion.prompt,
            "sample": completion.sample,
            "text": completion.text,
            "tokens": len(completion.ids),
            "finish_reason": completion.finish_reason,
        }
        if options.log_probs:
            record |= {"ids": completion.ids, "log_probs": completion.log_probs}
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()


def _speed(speed: Speed) -> str:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:,.0f} tokens/s" if tokens else "all while compiling"

    return (
        f"prompts {rate(speed.prefill_tokens, speed.prefill_seconds)}, "
        f"completions {rate(speed.decode_tokens, speed.decode_seconds)}, compiling {speed.compile_seconds:.1f} s"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake, 130 where it was stopped."""
    options = parse(arguments)
    try:
        return generate(options)
    except UserError as error:
        for line in str(error).splitlines():
            _say(f"error: {line}")
        return USAGE_ERROR
    except KeyboardInterrupt:  # before the first completion began
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
