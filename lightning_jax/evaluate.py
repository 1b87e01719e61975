"""What a trained model can do: a run of ours, or a Hugging Face folder.

    python -m lightning_jax.evaluate perplexity --from=runs/m1 --corpus=wiki=wiki.jsonl:text --corpus=book=book.txt
    python -m lightning_jax.evaluate needle --from=runs/m1 --lengths=1024,4096 --depths=0,25,50,75,100
    python -m lightning_jax.evaluate my_task.yaml lm_eval:arc_easy --from=SmolLM2-135M --out=results

Tasks may stand together. A .yaml file is a task of lm-evaluation-harness, and lm_eval:NAME is one of its own, whose
data it may download; both need `pip install lm_eval`. With --out, the folder gets results.json and evaluation.html,
written anew after each corpus, each length of needles and each task. What is there already, of the same model and with
the same options, is not computed again: an evaluation that was stopped goes on.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.command_line import Parser, add_mesh_option, finish, mesh_option, say, show
from lightning_jax.config import nearest_name
from lightning_jax.errors import UserError
from lightning_jax.evaluation import (
    NeedleSettings,
    Part,
    Scorer,
    TextModel,
    load_tasks,
    make_trials,
    needle_in_a_haystack,
    perplexity,
    read_texts,
    run_parts,
    run_task,
    table,
)
from lightning_jax.evaluation.harness import TASK_FILE_ENDINGS, problems_of_tasks
from lightning_jax.hosts import Hosts, add_arguments, join, options_in_common, run_facts
from lightning_jax.input_pipeline.chat_template import ChatTemplate
from lightning_jax.input_pipeline.embedded import EmbeddedCorpus
from lightning_jax.input_pipeline.sources import fingerprint
from lightning_jax.trained_model import TrainedModel, load_model, model_fingerprint

OWN_TASKS = ("perplexity", "needle")
HARNESS = "lm_eval:"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lightning_jax.evaluate", description="Evaluates a trained model.")
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help="perplexity, needle, FILE.yaml or lm_eval:NAME")
    add("--from", dest="source", required=True, metavar="PATH", help="a run's folder, or a Hugging Face folder")
    add("--out", type=Path, metavar="FOLDER", help="write results.json and evaluation.html there")
    add("--context_length", type=int, metavar="TOKENS", help="instead of the one that the model was trained on")
    add("--batch_tokens", type=int, default=16_384, help="computed at one time")
    add("--compute_dtype", choices=("float32", "bfloat16"), help="instead of the model's own")
    add_mesh_option(parser)
    group = parser.add_argument_group("perplexity").add_argument
    group("--corpus", action="append", default=[], metavar="NAME=PATH[:FIELD]", help="JSON lines, or one text")
    group("--layout", choices=("documents", "windows"), default="documents", help="apart, or all in one sequence")
    group("--stride", type=int, metavar="TOKENS", help="by which windows go on; half of the context if not given")
    group = parser.add_argument_group("needle").add_argument
    group("--lengths", default="256,512,1024,2048", metavar="TOKENS,...", help="of the prompt with its answer")
    group("--depths", default="0,25,50,75,100", metavar="PERCENT,...", help="where the needle stands")
    group("--trials", type=int, default=4, help="for each length and depth")
    group("--distractors", type=int, default=7, help="wrong answers beside the right one")
    group("--seed", type=int, default=0, help="the same seed asks the same")
    group = parser.add_argument_group("lm-evaluation-harness").add_argument
    group("--num_fewshot", type=int, help="examples before each question, instead of the task's own number")
    group("--limit", type=int, help="the first questions of each task only")
    group("--chat", action="store_true", help="questions are what a user says, in the model's chat template")
    group("--system", metavar="TEXT", help="with --chat: the system's message")
    add_arguments(parser)
    return parser.parse(arguments)


def evaluate(options: argparse.Namespace, hosts: Hosts) -> dict[str, Any]:
    """All of the command but telling its results, which it returns on every host.

    Raises:
        UserError: something that the user has to change; a line for each.
    """
    problems: list[str] = []
    tasks = _harness_tasks(options, problems)
    corpora = _corpora(options, problems) if "perplexity" in options.tasks else {}
    needle = _needle_settings(options, problems)
    mesh = mesh_option(options.mesh, hosts, problems)
    problems += [
        f"--{name}: {value} is not positive"
        for name in ("context_length", "batch_tokens", "stride", "num_fewshot", "limit")
        if (value := getattr(options, name)) is not None and value < (name != "num_fewshot")
    ]
    if options.chat and not tasks:
        problems.append("--chat: only tasks of lm-evaluation-harness ask questions; name one, or leave it out")
    if options.system is not None and not options.chat:
        problems.append("--system: it needs --chat")
    if options.out and options.out.exists() and not options.out.is_dir():
        problems.append(f"--out={options.out}: it is no folder")
    if problems or needle is None:
        raise UserError("\n".join(problems))
    texts = {f"corpus {name}": fingerprint(corpus) for name, corpus in corpora.items()}
    hosts.agree("what to evaluate", run_facts(None, options_in_common(options)) | texts, timeout=options.join_timeout)

    model = load_model(options.source, mesh=mesh, compute_dtype=options.compute_dtype, say=say)
    if options.chat and model.chat_template is None:
        raise UserError(f"--chat: {options.source} has no chat template; leave --chat out, or take a chat model")
    scorer = Scorer(model, batch_tokens=options.batch_tokens)
    context_length = _context_length(options, model, needle.lengths if "needle" in options.tasks else ())
    facts: dict[str, Any] = {"name": model.name, "from": options.source, "fingerprint": model_fingerprint(model)}
    facts |= {} if model.step is None else {"step": model.step}
    facts |= {"parameters": model.config.num_parameters(), "compute_dtype": model.config.compute_dtype}
    with _chat_template(options, model) as template:
        parts = [*_perplexity_parts(options, scorer, corpora, context_length)]
        if "needle" in options.tasks:
            parts += _needle_parts(scorer, needle)
        if tasks:
            parts += _harness_parts(options, TextModel(scorer, context_length, template), tasks)
        return run_parts(parts, facts, options.out, say)


def _perplexity_parts(
    options: argparse.Namespace, scorer: Scorer, corpora: dict[str, list[str]], context_length: int
) -> Iterator[Part]:
    how = {
        "layout": options.layout,
        "context_length": context_length,
        "stride": options.stride or -(-context_length // 2),
    }
    for name, texts in corpora.items():
        answer = functools.partial(perplexity, scorer, texts, **how)
        yield Part("perplexity", name, {"texts": fingerprint(texts), **how}, answer)


def _needle_parts(scorer: Scorer, settings: NeedleSettings) -> Iterator[Part]:
    haystack = EmbeddedCorpus("text")
    asked = {
        "haystack": haystack.fingerprint,
        "depths": settings.depths,
        "trials": settings.trials,
        "distractors": settings.distractors,
        "seed": settings.seed,
    }
    trials = make_trials([text for _, text in haystack.documents], scorer.tokenizer, settings)
    for length, of_length in trials.items():
        answer = functools.partial(needle_in_a_haystack, scorer, of_length)
        yield Part("needle", f"{length:,} tokens", asked, answer)


def _harness_parts(options: argparse.Namespace, model: TextModel, tasks: Sequence[str]) -> Iterator[Part]:
    how = {"num_fewshot": options.num_fewshot, "limit": options.limit, "system": options.system}
    asked = {"context_length": model.context_length, "chat": options.chat, **how}
    for task, objects in load_tasks(tasks).items():
        file = fingerprint(Path(task).read_text(encoding="utf-8")) if task.endswith(TASK_FILE_ENDINGS) else None
        yield Part("lm_eval", task, {"file": file, **asked}, functools.partial(run_task, model, objects, **how))


def _chat_template(
    options: argparse.Namespace, model: TrainedModel
) -> contextlib.AbstractContextManager[ChatTemplate | None]:
    if not options.chat or model.chat_template is None:
        return contextlib.nullcontext()
    return ChatTemplate(model.chat_template, special_tokens=model.special_tokens)


def _harness_tasks(options: argparse.Namespace, problems: list[str]) -> list[str]:
    named = [task for task in options.tasks if task not in OWN_TASKS]
    known = [task for task in named if task.startswith(HARNESS) or task.endswith(TASK_FILE_ENDINGS)]
    problems += [
        f"{task}: no such task; {nearest_name(task, OWN_TASKS)}; tasks of lm-evaluation-harness are FILE.yaml or "
        f"{HARNESS}NAME"
        for task in named
        if task not in known
    ]
    tasks = [task.removeprefix(HARNESS) for task in known]
    problems += problems_of_tasks(tasks)
    return tasks


def _corpora(options: argparse.Namespace, problems: list[str]) -> dict[str, list[str]]:
    """The texts of each corpus."""
    if not options.corpus:
        problems.append("perplexity: of which texts? give --corpus=NAME=PATH[:FIELD], one for each corpus")
    corpora: dict[str, list[str]] = {}
    for given in options.corpus:
        name, equals, place = given.partition("=")
        if not (name and equals and place):
            problems.append(f"--corpus={given}: not of the form NAME=PATH[:FIELD]")
            continue
        if name in corpora:
            problems.append(f"--corpus={given}: there is a corpus {name!r} already; give it another name")
            continue
        # A path may hold a colon itself.
        path, _, field = (place, "", "") if Path(place).exists() or ":" not in place else place.rpartition(":")
        try:
            corpora[name] = read_texts(Path(path), field or None)
        except UserError as error:
            problems.extend(f"--corpus={name}: {line}" for line in str(error).splitlines())
    return corpora


def _needle_settings(options: argparse.Namespace, problems: list[str]) -> NeedleSettings | None:
    numbers: dict[str, Any] = {}
    for name, kind in (("lengths", int), ("depths", float)):
        try:
            numbers[name] = tuple(kind(part) for part in getattr(options, name).split(",") if part)
        except ValueError:
            problems.append(f"--{name}={getattr(options, name)}: not numbers with commas between")
    if len(numbers) < 2:
        return None
    settings = NeedleSettings(**numbers, trials=options.trials, distractors=options.distractors, seed=options.seed)
    problems += [f"--{problem}" for problem in settings.problems()]
    return settings


def _context_length(options: argparse.Namespace, model: TrainedModel, needle_lengths: Sequence[int]) -> int:
    """The context to evaluate in; what is asked for must fit it.

    Raises:
        UserError: a line for each mistake.
    """
    context_length = options.context_length or model.context_length
    if context_length is None:
        raise UserError(f"--from={options.source}: it does not say its context length; give --context_length=TOKENS")
    if model.context_length and context_length > model.context_length:
        say(f"--context_length: longer than the {model.context_length:,} tokens that the model was trained on")
    problems = []
    if options.stride and options.stride > context_length:
        problems.append(f"--stride: {options.stride:,} would leave tokens out; at most the context, {context_length:,}")
    problems += [
        f"--lengths: {length:,} is longer than the context of {context_length:,} tokens; to try nevertheless, "
        f"give --context_length={length}"
        for length in needle_lengths
        if length > context_length
    ]
    if problems:
        raise UserError("\n".join(problems))
    return context_length


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake, 130 where it was stopped."""
    options = parse(arguments)

    def command() -> int:
        with join(options) as hosts:
            show(table(evaluate(options, hosts)))
            if options.out:
                say(f"written: {options.out}")
        return 0

    kept = f"; what was finished is in {options.out}, and the same command goes on from there" if options.out else ""
    return finish(command, stopped=f"stopped{kept}")


if __name__ == "__main__":
    sys.exit(main())
