"""EleutherAI's lm-evaluation-harness on our models: its three kinds of request, and its tasks, from local files too.

`TextModel` answers the requests and needs nothing of the harness; tasks need `pip install lm_eval`, which needs no
PyTorch for this. What a request means is the harness's: how a context and its continuation are split into tokens,
contexts cut at the left where they are too long, rolling windows that score every token once.
"""

import importlib.util
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.evaluation.scoring import Scorer, Span, encode_pair, start_ids, windows
from lightning_jax.generation import Sampling
from lightning_jax.input_pipeline import encode
from lightning_jax.input_pipeline.chat_template import ChatTemplate, Message, encode_rendered, mark_texts
from lightning_jax.input_pipeline.sources import fingerprint

TASK_FILE_ENDINGS = (".yaml", ".yml")
MAX_NEW_TOKENS = 256  # the harness's own default
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class TextModel:
    """A model as the harness asks it: texts in, log-likelihoods and texts out.

    Args:
        context_length: tokens that the model sees at most.
        chat_template: renders the contexts, in which special tokens then are what they are.
    """

    def __init__(self, scorer: Scorer, context_length: int, chat_template: ChatTemplate | None = None):
        self.scorer, self.context_length, self.chat_template = scorer, context_length, chat_template
        self.tokenizer = scorer.tokenizer

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A chat as a context: up to the assistant's turn, or else up to the end of the last message, which goes on.

        What looks like a special token in a message is marked as the text that it is.

        Raises:
            ChatTemplateError: what the template did, in one line.
        """
        assert self.chat_template is not None
        (text,) = self.chat_template.render(
            [mark_texts(self.tokenizer, messages)],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-likelihood in nats, and whether it is the greedy one.

        Raises:
            UserError: a continuation that alone is longer than the context.
        """
        scores = self.scorer.score([self._span(context, continuation) for context, continuation in pairs])
        return [(each.log_likelihood, each.greedy) for each in scores]

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text in nats; of longer ones in windows, the last as full as the others."""
        documents = [np.concatenate([start_ids(self.tokenizer), encode(self.tokenizer, text)]) for text in texts]
        spans = [list(windows(ids, self.context_length, self.context_length)) for ids in documents]
        scores = iter(self.scorer.score([span for each in spans for span in each]))
        return [float(sum(next(scores).log_likelihood for _ in each)) for each in spans]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each context, up to the first of its settings' `until` or the model's eos.

        Raises:
            UserError: settings that cannot be; a line for each.
        """
        samplings = [self._sampling(settings) for _, settings in requests]
        prompts = []
        for (context, _), sampling in zip(requests, samplings, strict=True):
            room = self.context_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={sampling.max_new_tokens:,} leaves no room for a prompt in a context of "
                    f"{self.context_length:,} tokens"
                )
            prompts.append(self._begun(self._encode(context))[-room:])
        return self.scorer.continuations(prompts, samplings)

    def _span(self, context: str, continuation: str) -> Span:
        if self.chat_template:
            continuation = mark_texts(self.tokenizer, continuation)
        before, scored = encode_pair(self._encode, context, continuation)
        if not 0 < len(scored) <= self.context_length:
            raise UserError(
                f"a continuation of {len(scored):,} tokens cannot be scored in a context of {self.context_length:,}: "
                f"{continuation[:60]!r}"
            )
        # All tokens but the last are inputs.
        before = self._begun(before)[-(self.context_length + 1 - len(scored)) :]
        return Span(np.concatenate([before, scored]), len(before))

    def _encode(self, text: str) -> np.ndarray:
        return (encode_rendered if self.chat_template else encode)(self.tokenizer, text)

    def _begun(self, ids: np.ndarray) -> np.ndarray:
        """The ids behind bos, which a chat template writes itself.

        Behind eos where there is no bos, but only if nothing else would be there.
        """
        if len(ids) and (self.chat_template or self.tokenizer.bos_id is None):
            return ids
        begun = np.concatenate([start_ids(self.tokenizer), ids])
        if not len(begun):
            raise UserError("an empty context has no tokens: the tokenizer has neither bos nor eos")
        return begun

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        eos = () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)
        until = settings.get("until") or []
        given = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        if unknown := set(settings) - {"until", "do_sample", *_LENGTHS, *_SAMPLING}:
            known = ", ".join(("until", "do_sample", "max_gen_toks", *_SAMPLING))
            raise UserError(f"generation_kwargs: {', '.join(sorted(unknown))}: not known; known: {known}")
        if not settings.get("do_sample", given.get("temperature", 0) > 0):
            given["temperature"] = 0
        sampling = Sampling(
            max_new_tokens=next((int(settings[name]) for name in _LENGTHS if settings.get(name)), MAX_NEW_TOKENS),
            stop=(until,) if isinstance(until, str) else tuple(filter(None, until)),
            stop_ids=tuple(dict.fromkeys((*self.scorer.model.eos_ids, *eos))),
            **given,
        )
        if problems := sampling.problems():
            raise UserError("\n".join(f"generation_kwargs: {problem}" for problem in problems))
        return sampling


def problems_of_tasks(tasks: Sequence[str]) -> list[str]:
    """What can be known to be wrong with tasks before a model is loaded, one line each."""
    if not tasks:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        return [f"{', '.join(tasks)}: tasks of lm-evaluation-harness need it: pip install lm_eval"]
    return [
        f"{task}: there is no such file"
        for task in tasks
        if task.endswith(TASK_FILE_ENDINGS) and not Path(task).is_file()
    ]


def load_tasks(tasks: Sequence[str]) -> dict[str, list[Any]]:
    """The harness's own objects for each task, or group of tasks.

    Args:
        tasks: YAML files, or names of the harness's own tasks, whose data it may download.

    Raises:
        UserError: a line for each task that the harness does not know or cannot load.
    """
    # Its bootstrap would fork this process, whose threads hold locks of XLA.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval.tasks import TaskManager

    only_files = all(task.endswith(TASK_FILE_ENDINGS) for task in tasks)
    manager = TaskManager(include_defaults=not only_files)
    objects: dict[str, list[Any]] = {}
    problems = []
    for task in tasks:
        try:
            loaded = manager.load([task])
        except Exception as error:  # a task file can be wrong in any way
            problems.append(f"{task}: the harness cannot load it: {_first_line(error)}")
            continue
        # A group comes with its tasks, and with the groups in it behind it.
        objects[task] = list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())
    if problems:
        raise UserError("\n".join(problems))
    return objects


def run_task(
    model: TextModel, objects: list[Any], *, num_fewshot: int | None, limit: int | None, system: str | None
) -> dict[str, Any]:
    """What the harness reports of a task, ready for JSON.

    Args:
        objects: of `load_tasks`.
        num_fewshot: examples before each question, instead of the task's own number; turns of the chat in a chat.
        limit: the first questions only.
        system: the system's message in a chat.

    Raises:
        UserError: the harness cannot run it on this model.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    try:
        results = simple_evaluate(
            _as_harness_model(model),
            tasks=objects,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=model.chat_template is not None,
            fewshot_as_multiturn=True,
            system_instruction=system,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except Exception as error:  # a task's templates and metrics meet its questions only here
        if any(frame.filename == __file__ for frame in traceback.extract_tb(error.__traceback__)[1:]):
            raise  # out of TextModel, so no fault of the task
        names = ", ".join(str(getattr(each, "task_name", None) or each.name) for each in objects)
        raise UserError(f"{names}: the harness cannot run it: {_first_line(error)}") from error
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _as_harness_model(model: TextModel) -> Any:
    """The model as an instance of the harness's own class, which it asks for."""
    from lm_eval.api.model import LM

    class LightningJax(LM):
        def loglikelihood(self, requests):
            return model.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return model.rolling_log_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests):
            return model.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return model.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

        @property
        def tokenizer_name(self):
            """By which the harness tells apart the contexts that it keeps."""
            return fingerprint([model.tokenizer.fingerprint, self.chat_template()])

        def chat_template(self, chat_template=True):
            return model.chat_template.template if model.chat_template else ""

    return LightningJax()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
