"""Rewards of math: the last number against GSM8K's answer, and any expression against MATH's.

Source: Tulu 3 (arXiv 2411.15124), section 6; expressions are compared by math-verify.
"""

import importlib.util
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Self

from lightning_jax.errors import UserError
from lightning_jax.rewards.answers import final_part, last_line, last_number, math_answer
from lightning_jax.rewards.process_pool import ProcessPool, RequestFault
from lightning_jax.rewards.reward import Completion, Reward, required

PROCESS = Path(__file__).with_name("math_process.py")
LONGEST_ANSWER = 1000  # characters; no ground truth comes near, and parsers take long


def gsm8k_reward(completions: Sequence[Completion], /) -> list[Reward]:
    """One where the last number is the record's `ground_truth`.

    Tulu 3 compares the digits as text: 18.00 is not 18 there, and -18 is. Here numbers are compared.
    """
    rewards = []
    for completion in completions:
        truth = str(required(completion, "ground_truth"))
        try:
            gold = Decimal(truth.replace(",", "").strip())
        except InvalidOperation:
            raise UserError(f"ground_truth={truth!r} is not a number, as answers of GSM8K are") from None
        number = last_number(final_part(completion.text))
        reason = "no number" if number is None else f"{str(number)[:40]} {'=' if number == gold else '≠'} {gold}"
        rewards.append(Reward(float(number == gold), reason))
    return rewards


class MathReward:
    """One where the answer of the completion equals the record's `ground_truth` as an expression.

    Comparisons run in processes of their own, which end with `close` or the `with` block.

    Args:
        processes: at the same time.
        cpu_seconds: of one comparison. An answer that takes longer is wrong; gold answers take milliseconds.

    Raises:
        UserError: math-verify is not installed.
    """

    def __init__(self, processes: int = 2, cpu_seconds: int = 5):
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the math reward needs math-verify: pip install 'lightning_jax[rewards]'")
        self._pool = ProcessPool(PROCESS, processes, cpu_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        rewards: list[Reward | None] = []
        requests = []
        for completion in completions:
            gold = str(required(completion, "ground_truth"))
            text = final_part(completion.text)
            answer = math_answer(text)
            if answer is not None and _plain(answer) == _plain(gold):
                rewards.append(Reward(1.0, f"{answer} = {gold}"))
                continue
            line = last_line(text)
            if len(line if answer is None else answer) > LONGEST_ANSWER:
                rewards.append(Reward(0.0, f"no answer of at most {LONGEST_ANSWER:,} characters"))
            else:
                rewards.append(None)
                requests.append({"gold": gold, "answer": answer, "line": line})
        compared = iter(zip(requests, self._pool.map(requests), strict=True))
        return [reward or _reward(*next(compared)) for reward in rewards]


def _reward(request: dict, outcome: dict | Exception) -> Reward:
    if isinstance(outcome, RequestFault):
        return Reward(0.0, str(outcome))
    if isinstance(outcome, Exception):
        return Reward.infra(f"math-verify: {outcome or type(outcome).__name__}")
    if outcome["problem"] or not outcome["read"]:
        return Reward(0.0, outcome["problem"] or "no answer that can be read")
    given = request["answer"] or outcome["read"]
    return Reward(float(outcome["equal"]), f"{given} {'=' if outcome['equal'] else '≠'} {request['gold']}")


def _plain(answer: str) -> str:
    """An answer without what only sets it: spaces, dollars, text boxes, sizes of brackets and of fractions."""
    answer = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\(?:left|right|[!,;: ])|[\s$]", "", answer)
    return re.sub(r"\\[dt]frac", r"\\frac", answer).removesuffix(".")
