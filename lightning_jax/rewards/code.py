"""Rewards of generated code: unit tests of a function, or outputs of a program, in the sandbox.

What a program prints, and what a function returns, is compared where the code under test cannot reach.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from lightning_jax.errors import UserError
from lightning_jax.rewards.answers import final_part
from lightning_jax.rewards.reward import Completion, Reward, required
from lightning_jax.rewards.sandbox import Execution, FunctionTests, Program, Sandbox

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def python_code(text: str) -> str:
    """The code of a completion: its last fenced block, or all of it."""
    text = final_part(text) if "</think>" in text else text
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else text


@dataclass(frozen=True)
class CodeReward:
    """One where all tests of the record pass; the sandbox ends with the `with` block.

    A record has either `test` and `entry_point` (and `prompt`, the code that the model was to continue), as in
    HumanEval, or `inputs` and `outputs`, lists of what a program reads and prints.
    """

    sandbox: Sandbox

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sandbox.close()

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        functions, programs = {}, {}
        for i, completion in enumerate(completions):
            code = python_code(completion.text)
            if "test" in completion.record:
                functions[i] = _function_tests(completion, code)
            elif "inputs" in completion.record:
                programs[i] = [Program(code, each) for each in completion.record["inputs"]]
            else:
                fields = ", ".join(completion.record)
                raise UserError(
                    f"a record of code has `test` and `entry_point`, or `inputs` and `outputs`; not {fields}"
                )
        rewards: dict[int, Reward] = {}
        for i, execution in zip(functions, self.sandbox.test(list(functions.values())), strict=True):
            rewards[i] = _of_tests(execution)
        executions = iter(self.sandbox.run([each for cases in programs.values() for each in cases]))
        for i, cases in programs.items():
            outputs = required(completions[i], "outputs")
            rewards[i] = _of_outputs([next(executions) for _ in cases], outputs)
        return [rewards[i] for i in range(len(completions))]


def _function_tests(completion: Completion, code: str) -> FunctionTests:
    name, prompt = required(completion, "entry_point"), completion.record.get("prompt", "")
    if not re.search(rf"^[ \t]*def[ \t]+{re.escape(name)}\b", code, re.MULTILINE):
        code = prompt + code  # only the body was written
    return FunctionTests(code, name, completion.record["test"], prompt)


def _of_tests(execution: Execution) -> Reward:
    if execution.status == "time":
        return Reward(0.0, "out of time")
    if execution.status == "infra_error" or not execution.stdout:
        return Reward.infra(f"sandbox: {execution.stderr.strip()[-200:] or 'the tests came to no end'}")
    verdict = json.loads(execution.stdout)
    return Reward(float(verdict["passed"]), verdict["reason"])


def _of_outputs(executions: Sequence[Execution], outputs: Sequence[str]) -> Reward:
    for case, (execution, output) in enumerate(zip(executions, outputs, strict=True), 1):
        if execution.status == "infra_error":
            return Reward.infra(f"sandbox: {execution.stderr.strip()[-200:]}")
        if execution.status == "time":
            return Reward(0.0, f"case {case}: out of time")
        if _lines(execution.stdout) != _lines(output):
            error = execution.stderr.strip().splitlines()
            return Reward(0.0, f"case {case}: {error[-1] if error else 'another output'}"[:300])
    return Reward(1.0, f"all {len(outputs)} cases pass")


def _lines(text: str) -> list[str]:
    """A text's lines without what nobody sees: spaces at their ends, empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
