"""The form of a completion as a reward: thinking in its tags, then an answer.  Source: MiniMax-M1 (arXiv 2506.13585),
section 4.1."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_jax.rewards.reward import Completion, Reward


@dataclass(frozen=True)
class FormatReward:
    """One for `<think>...</think>` and then an answer, each tag once; whatever the answer is worth.

    Attributes:
        think_is_open: the prompt ends with `<think>`, as many chat templates have it.
        answer_tags: the answer has to be in `<answer>...</answer>`, with nothing behind.
    """

    think_is_open: bool
    answer_tags: bool

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        return [self._reward(completion) for completion in completions]

    def _reward(self, completion: Completion) -> Reward:
        problem = self._problem(completion)
        return Reward(float(problem is None), problem or "in form")

    def _problem(self, completion: Completion) -> str | None:
        if not completion.finished:
            return "not finished"
        text = completion.text.strip()
        opened = int(not self.think_is_open)
        if text.count("<think>") != opened or not text.startswith("<think>" * opened) or text.count("</think>") != 1:
            return "not one <think>...</think> at the beginning"
        answer = text.partition("</think>")[2].strip()
        if self.answer_tags:
            if text.count("<answer>") != 1 or text.count("</answer>") != 1:
                return "not one <answer>...</answer>"
            if not (answer.startswith("<answer>") and answer.endswith("</answer>")):
                return "more than <answer>...</answer> behind the thinking"
            answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
        return None if answer else "no answer"
