"""EleutherAI's lm-evaluation-harness on our models: its three kinds of request, and its tasks, from local files too.

`TextModel` answers the requests and needs nothing of the harness; `run_tasks` needs `pip install lm_eval`, which needs
no PyTorch for this. What a request means is the harness's: how a context and its continuation are split into tokens,
contexts cut at the left where they are too long, rolling windows that score every token once.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.evaluation.scoring import Scorer, Span, encode_pair, make_generator, start_ids, windows
from lightning_jax.generation import Sampling
from lightning_jax.input_pipeline import encode

TASK_FILE_ENDINGS = (".yaml", ".yml")
MAX_NEW_TOKENS = 256  # the harness's own default
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class TextModel:
    """A model as the harness asks it: texts in, log-likelihoods and texts out.

    Args:
        context_length: tokens that the model sees at most.
    """

    def __init__(self, scorer: Scorer, context_length: int):
        self.scorer, self.context_length = scorer, context_length
        self.tokenizer = scorer.model.tokenizer

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
            prompts.append(self._begun(encode(self.tokenizer, context))[-room:])
        generator = make_generator(self.scorer, prompts, samplings)
        texts = {completion.prompt: completion.text for completion in generator.generate(prompts, samplings)}
        return [texts[number] for number in range(len(prompts))]

    def _span(self, context: str, continuation: str) -> Span:
        before, scored = encode_pair(self.tokenizer, context, continuation)
        if not 0 < len(scored) <= self.context_length:
            raise UserError(
                f"a continuation of {len(scored):,} tokens cannot be scored in a context of {self.context_length:,}: "
                f"{continuation[:60]!r}"
            )
        # All tokens but the last are inputs.
        before = self._begun(before)[-(self.context_length + 1 - len(scored)) :]
        return Span(np.concatenate([before, scored]), len(before))

    def _begun(self, ids: np.ndarray) -> np.ndarray:
        """The ids behind bos; behind eos where there is no bos, but only if nothing else would be there."""
        if len(ids) and self.tokenizer.bos_id is None:
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


def run_tasks(
    model: TextModel, tasks: Sequence[str], *, num_fewshot: int | None, limit: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs tasks of lm-evaluation-harness; what it returns is what the harness reports, ready for JSON.

    Args:
        tasks: YAML files, or names of the harness's own tasks, whose data it may download.
        num_fewshot: examples before each question, instead of the task's own number.
        limit: the first questions of each task only.

    Raises:
        UserError: a task that the harness does not know or cannot load.
    """
    # Its bootstrap would fork this process, whose threads hold locks of XLA.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    only_files = all(task.endswith(TASK_FILE_ENDINGS) for task in tasks)
    manager = TaskManager(include_defaults=not only_files)
    loaded, problems = [], []
    for task in tasks:
        try:
            loaded.extend(manager.load([task])["tasks"].values())
        except Exception as error:  # a task file can be wrong in any way
            problems.append(f"{task}: the harness cannot load it: {_first_line(error)}")
    if problems:
        raise UserError("\n".join(problems))
    say(f"lm-evaluation-harness: {', '.join(tasks)}")
    results = simple_evaluate(
        _as_harness_model(model),
        tasks=loaded,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
    )
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

    return LightningJax()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
