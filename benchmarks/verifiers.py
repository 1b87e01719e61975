"""How right our verifiers are: precision and recall on solutions that others have labelled, and what they cost.

    python benchmarks/verifiers.py --data=FOLDER

FOLDER has any of gsm8k/example_model_solutions.jsonl (openai/grade-school-math: solutions of four models, with labels),
math500/test.jsonl (MATH, with `solution` and `answer`) and humaneval/HumanEval.jsonl.gz (openai/human-eval, whose
canonical solutions have to be accepted and mutated ones rejected). `--quick` takes every twentieth row of each.
"""

import argparse
import ast
import gzip
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recording

from lightning_jax.rewards import CodeReward, Completion, MathReward, Program, RewardFunction, Sandbox, gsm8k_reward

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def tulu3_gsm8k(text: str, truth: str) -> bool:
    """GSM8K's verifier of Tulu 3: the digits of the last number, as text."""
    numbers = re.findall(r"[-+]?\d*\.\d+|\d+", re.sub(r"(\d),(\d)", r"\1\2", text))
    return (numbers[-1] if numbers else text).lower() == truth.lower()


def completion(text: str, **record: object) -> Completion:
    return Completion((), text, len(text), True, record)


def rows_of(path: Path, step: int) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][::step]


def agreement(accepted: Sequence[bool], labels: Sequence[bool]) -> dict[str, Any]:
    """Precision, recall and counts of what is accepted against what is right, and which solutions are disagreed on."""
    both = sum(a and b for a, b in zip(accepted, labels, strict=True))
    return {
        "precision": both / max(1, sum(accepted)),
        "recall": both / max(1, sum(labels)),
        "false_positives": sum(accepted) - both,
        "false_negatives": sum(labels) - both,
        "solutions": len(labels),
        "disagreements": [i for i, (a, b) in enumerate(zip(accepted, labels, strict=True)) if a != b],
    }


def timed(reward: RewardFunction, completions: Sequence[Completion]) -> tuple[list[bool], float]:
    """Which are accepted, and how many there were a second; infra errors stop the benchmark."""
    begin = time.perf_counter()
    rewards = reward(completions)
    seconds = time.perf_counter() - begin
    if failed := [each.reason for each in rewards if each.infra_error]:
        raise RuntimeError(f"{len(failed)} infra errors: {failed[0]}")
    return [reward.score == 1 for reward in rewards], len(completions) / seconds


def gsm8k(path: Path, step: int, math: RewardFunction) -> dict[str, dict]:
    """Three verifiers against the labels that came with the solutions."""
    completions, labels = [], []
    for row in rows_of(path, step):
        truth = row["ground_truth"].rpartition("A:")[2].strip().replace(",", "")
        for model in MODELS:
            completions.append(completion(row[model]["solution"], ground_truth=truth))
            labels.append(row[model]["is_correct"])

    def results(name: str, accepted: list[bool], rate: float | None) -> dict:
        return {name: {**agreement(accepted, labels), "per_second": rate}}

    tulu = [tulu3_gsm8k(each.text, each.record["ground_truth"]) for each in completions]
    return (
        results("GSM8K, Tulu 3's rule", tulu, None)
        | results("GSM8K, last number", *timed(gsm8k_reward, completions))
        | results("GSM8K, math-verify", *timed(math, completions))
    )


def math(path: Path, step: int, reward: RewardFunction) -> dict[str, dict]:
    """Solutions against their own answers, which are right, and against the next problem's where that is another text.

    Two texts may be one answer, x=5 and 5; such a pair is counted as wrongly accepted.
    """
    rows = rows_of(path, step)
    others = [*rows[1:], rows[0]]
    completions = [completion(row["solution"], ground_truth=row["answer"]) for row in rows]
    wrong = [
        completion(row["solution"], ground_truth=other["answer"])
        for row, other in zip(rows, others, strict=True)
        if row["answer"] != other["answer"]
    ]
    accepted, rate = timed(reward, completions + wrong)
    labels = [True] * len(completions) + [False] * len(wrong)
    return {"MATH, own and others' answers": {**agreement(accepted, labels), "per_second": rate}}


def humaneval(path: Path, step: int, reward: RewardFunction) -> dict[str, dict]:
    """Canonical solutions, and the same with one mutation each that changes what they return."""
    rows = rows_of(path, step)
    canonical = [completion(row["prompt"] + row["canonical_solution"], **row) for row in rows]
    mutated = [completion(mutate(row["prompt"] + row["canonical_solution"], row["entry_point"]), **row) for row in rows]
    accepted, rate = timed(reward, canonical + mutated)
    labels = [True] * len(rows) + [False] * len(rows)
    return {"HumanEval, canonical and mutated": {**agreement(accepted, labels), "per_second": rate}}


def mutate(source: str, name: str) -> str:
    """The function does its work and returns something else: a pair of its value and 0."""
    tree = ast.parse(source)
    (function,) = (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name)
    function.name = "original"
    return f"{ast.unparse(tree)}\n\ndef {name}(*arguments):\n    return original(*arguments), 0\n"


def executions_per_second(workers: int, step: int) -> float:
    """Of a program that only prints, in the sandbox: what isolation and the start of Python cost."""
    programs = [Program("print(1)")] * (400 // step)
    with Sandbox(workers) as sandbox:
        begin = time.perf_counter()
        executions = sandbox.run(programs)
        seconds = time.perf_counter() - begin
    if any(each.stdout != "1\n" for each in executions):
        raise RuntimeError("an execution failed")
    return len(programs) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    step = 20 if options.quick else 1
    parts: dict[str, tuple[Callable, Callable]] = {
        "gsm8k/example_model_solutions.jsonl": (gsm8k, lambda: MathReward(options.workers)),
        "math500/test.jsonl": (math, lambda: MathReward(options.workers)),
        "humaneval/HumanEval.jsonl.gz": (humaneval, lambda: CodeReward(Sandbox(options.workers))),
    }
    results: dict[str, dict] = {}
    for name, (measure, make) in parts.items():
        if (path := options.data / name).exists():
            with make() as reward:
                results |= measure(path, step, reward)
    lines = [
        "# Verifiers",
        "",
        "| verifier | solutions | precision | recall | wrongly accepted | wrongly rejected | a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in results.items():
        rate = f"{each['per_second']:,.0f}" if each["per_second"] else ""
        lines.append(
            f"| {name} | {each['solutions']:,} | {each['precision']:.4f} | {each['recall']:.4f} "
            f"| {each['false_positives']} | {each['false_negatives']} | {rate} |"
        )
    executions = executions_per_second(options.workers, step)
    lines += ["", f"The sandbox executes {executions:.0f} programs a second with {options.workers} workers."]
    versions = {"lightning_jax": recording.package_versions("math-verify", "sympy")}
    recording.write(
        "verifiers",
        lines,
        {"results": results, "executions_per_second": executions},
        versions,
        folder=None if options.quick else recording.RESULTS,
    )


if __name__ == "__main__":
    main()
