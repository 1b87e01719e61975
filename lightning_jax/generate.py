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
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import jax

from lightning_jax import parallel
from lightning_jax.command_line import Parser, add_mesh_option, finish, mesh_option, say, show
from lightning_jax.errors import UserError
from lightning_jax.generation import Completion, GenerationSettings, Generator, Sampling, Speed
from lightning_jax.hosts import STOPPED, Hosts, add_arguments, join, options_in_common, run_facts
from lightning_jax.input_pipeline import Tokenizer, encode
from lightning_jax.input_pipeline.chat_template import encode_chats
from lightning_jax.input_pipeline.sources import fingerprint
from lightning_jax.trained_model import TrainedModel, load_model

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a chat

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_tokens")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lightning_jax.generate", description="Generates text with a trained model.")
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
    add_mesh_option(parser)
    add("--out", type=pathlib.Path, metavar="FILE.jsonl", help="write completions there")
    add("--log_probs", action="store_true", help="with --out: token ids and their log-probabilities too")
    add_arguments(parser)
    return parser.parse(arguments)


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts, from wherever they were to come.

    Raises:
        UserError: a line for each mistake.
    """
    if options.prompt is not None:
        return [options.prompt]
    place = "standard input" if options.prompts is None else f"--prompts={options.prompts}"
    try:
        text = sys.stdin.read() if options.prompts is None else options.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines knows line ends that JSON does not
    if not lines:
        raise UserError(f"{place}: it holds no prompt")
    return list(lines) if options.prompts is None else _parse_prompts(lines, place, chat=options.chat)


def _parse_prompts(lines: Sequence[str], place: str, *, chat: bool) -> list[Prompt]:
    """Raises UserError with a line for each that is no prompt."""
    prompts: list[Prompt] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        with contextlib.suppress(json.JSONDecodeError):
            match json.loads(line):
                case {"prompt": str(text)}:
                    prompts.append(text)
                    continue
                case {"messages": [{"role": str()}, *_] as messages} if chat:
                    prompts.append(messages)
                    continue
        wanted = '{"prompt": "..."} or {"messages": [...]}' if chat else '{"prompt": "..."}'
        problems.append(f"{place}: line {number} is not {wanted}")
    if problems:
        raise UserError("\n".join(problems))
    return prompts


def encode_prompts(
    options: argparse.Namespace, model: TrainedModel, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[list[int]]:
    """The tokens of each prompt: the beginning of a document, or a chat up to the assistant's turn.

    Raises:
        UserError: a line for each mistake.
    """
    problems = [f"prompt {number}: it is empty" for number, prompt in enumerate(prompts) if not prompt]
    problems += [f"prompt {number}: it is not UTF-8" for number, prompt in enumerate(prompts) if not _is_text(prompt)]
    if problems:
        raise UserError("\n".join(problems))
    if not options.chat:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [[*bos, *encode(tokenizer, prompt).tolist()] for prompt in prompts if isinstance(prompt, str)]
    if model.chat_template is None:
        raise UserError(f"--chat: {options.source} has no chat template; leave --chat out, or take a chat model")
    system = [{"role": "system", "content": options.system}] if options.system else []
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    encoded = encode_chats(
        tokenizer,
        model.chat_template,
        [[*system, *chat] for chat in chats],
        special_tokens=model.special_tokens,
        add_generation_prompt=True,
    )
    return [ids.tolist() for ids in encoded]


def _is_text(prompt: Prompt) -> bool:
    """Whether UTF-8 can hold it: bytes that were no text, and "\\ud800" in JSON, are halves of characters."""
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def make_sampling(options: argparse.Namespace, model: TrainedModel, tokenizer: Tokenizer) -> Sampling:
    """How to sample, ending at the model's eos.

    Raises:
        UserError: a token that the model does not have.
    """
    special = tokenizer.special_tokens
    if unknown := [token for token in options.stop_token if token not in special]:
        known = ", ".join(special) or "none"
        raise UserError(
            "\n".join(f"--stop_token={token}: no special token of the model; known: {known}" for token in unknown)
        )
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    stop_ids = dict.fromkeys((*model.eos_ids, *eos, *(special[token] for token in options.stop_token)))
    return Sampling(
        **{name: getattr(options, name) for name in SAMPLING},
        stop=tuple(options.stop),
        stop_ids=tuple(stop_ids),
        samples=options.samples,
        seed=options.seed,
    )


def check_options(options: argparse.Namespace, hosts: Hosts) -> parallel.MeshConfig | None:
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
    if options.out and options.out.is_dir():
        problems.append(f"--out={options.out}: it is a folder; name a file")
    elif options.out and not options.out.parent.is_dir():
        problems.append(f"--out={options.out}: there is no folder {options.out.parent}")
    mesh = mesh_option(options.mesh, hosts, problems)
    if problems:
        raise UserError("\n".join(problems))
    return mesh


def generate(options: argparse.Namespace, hosts: Hosts) -> int:
    """All of the command; returns its exit code.

    Every host computes its part of every completion; the first one tells them.

    Raises:
        UserError: something that the user has to change; one line for each.
    """
    mesh = check_options(options, hosts)
    prompts = read_prompts(options)
    facts = run_facts(None, options_in_common(options)) | {"a prompt": fingerprint(prompts)}
    hosts.agree("what to generate", facts, timeout=options.join_timeout)
    model = load_model(options.source, mesh=mesh, compute_dtype=options.compute_dtype, say=say)
    if (tokenizer := model.tokenizer) is None:
        raise UserError(f"--from={options.source}: there is no tokenizer in it, and prompts are text")
    sampling = make_sampling(options, model, tokenizer)
    tokens = encode_prompts(options, model, tokenizer, prompts)
    generator = make_generator(options, model, tokens)
    if problems := list(filter(None, (generator.problem(n, ids, sampling) for n, ids in enumerate(tokens)))):
        raise UserError("\n".join(problems))

    wanted = len(tokens) * options.samples
    streaming = wanted == 1 and not options.out
    on_text = (lambda prompt, sample, text: show(text, end="")) if streaming else None
    done, exit_code = 0, 0
    with _opened(options.out) as file:
        try:
            for completion in generator.generate(tokens, sampling, on_text=on_text):
                if streaming:
                    show("")
                elif options.out is None:
                    show(f"--- prompt {completion.prompt}, sample {completion.sample} ({completion.finish_reason})")
                    show(completion.text or "")
                elif file:
                    file.write(_record(completion, log_probs=options.log_probs) + "\n")
                    file.flush()
                done += 1
        except KeyboardInterrupt:
            if hosts.count > 1:  # the others wait for this one, and must hear of it
                raise
            exit_code = STOPPED
    kept = f"; they are in {options.out}" if options.out else ""
    say(("stopped: " if exit_code else "") + f"{done} of {wanted} completions{kept}; {_speed(generator.speed)}")
    return exit_code


def make_generator(options: argparse.Namespace, model: TrainedModel, tokens: Sequence[Sequence[int]]) -> Generator:
    """With room for the longest prompt and its completion, and no more slots than there will be sequences."""
    longest = max(map(len, tokens), default=0) + options.max_new_tokens
    if model.context_length and longest > model.context_length:
        say(f"up to {longest:,} tokens: longer than the {model.context_length:,} that the model was trained on")
    shards = parallel.batch_shards(model.mesh)
    slots = min(options.slots, max(len(tokens) * options.samples, 1))
    settings = GenerationSettings(slots=-(-slots // shards) * shards, capacity=options.capacity or longest)
    return Generator(model.config, model.params, settings, mesh=model.mesh, tokenizer=model.tokenizer)


@contextlib.contextmanager
def _opened(path: pathlib.Path | None) -> Iterator[TextIO | None]:
    """The file for completions, which the first process alone writes."""
    if path is None or jax.process_index() != 0:
        yield None
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror}") from None


def _record(completion: Completion, *, log_probs: bool) -> str:
    record: dict[str, Any] = {
        "prompt": completion.prompt,
        "sample": completion.sample,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
    }
    if log_probs:
        record |= {"ids": completion.ids, "log_probs": completion.log_probs}
    return json.dumps(record, ensure_ascii=False)


def _speed(speed: Speed) -> str:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:,.0f} tokens/s" if tokens else "all while compiling"

    return (
        f"prompts {rate(speed.prefill_tokens, speed.prefill_seconds)}, "
        f"completions {rate(speed.decode_tokens, speed.decode_seconds)}, compiling {speed.compile_seconds:.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake, 130 where it was stopped."""
    options = parse(arguments)

    def command() -> int:
        with join(options) as hosts:
            return generate(options, hosts)

    return finish(command, stopped="stopped before the first completion began")


if __name__ == "__main__":
    sys.exit(main())
