"""Does post-training learn? A tiny hybrid on GSM8K: fine-tuning, then DPO and a reward model, on held-out questions.

    python benchmarks/gsm8k_preferences.py --data FOLDER [--workdir FOLDER]

FOLDER holds train.jsonl and example_model_solutions.jsonl of GSM8K (arXiv 2110.14168; openai/grade-school-math, MIT).
Fine-tuning is on the worked solutions of train.jsonl, from fresh weights. Preferences are real: of the four models'
solutions to a question of the test split, each right one is paired with a wrong one as long as there are both. A share
of the questions of each is held out by a hash of the question. For every seed three runs: fine-tuning, and from there
DPO (length-normalised, as in Tulu 3) and a reward model.

Of two solutions to a question the longer one is more often right, so the table says how often: what a model has to
beat to have learned more than length. The reward model's intervals are bootstrapped over questions.

Result: benchmarks/results/gsm8k_preferences.json and .md; about half an hour on two cores. With --workdir a command
that was stopped goes on where it was, in the middle of a run if need be. `--quick` proves in two minutes that it works
and writes nothing.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import recording

from lightning_jax import recipes
from lightning_jax.config import RunConfig
from lightning_jax.config_reader import parse
from lightning_jax.input_pipeline.chat_records import chat_document, prompt
from lightning_jax.input_pipeline.documents import is_held_out
from lightning_jax.metrics import read_metrics
from lightning_jax.recipes import Dimensions, adamw, batch_size, corpus, stage, wsd
from lightning_jax.train import Trainer
from lightning_jax.trained_reward_model import load_reward_model

HELD_OUT = 0.3
VOCABULARY = 2048
MODEL = Dimensions(128, 4, 4, 2, 32, 384, VOCABULARY)
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
RESAMPLES = 10_000
PASSES = {"sft": 1.0, "dpo": 2.0, "reward_model": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with the files of GSM8K")
    parser.add_argument("--workdir", type=Path, metavar="FOLDER", help="keeps the runs; a temporary one if not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, nothing written")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = arguments.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        pairs = list(preferences(arguments.data / "example_model_solutions.jsonl"))
        solutions = list(conversations(arguments.data / "train.jsonl"))
        if arguments.quick:
            pairs, solutions = pairs[:60], solutions[:60]
        texts = [{"text": "\n".join(message["content"] for message in each["messages"])} for each in solutions]
        for name, records in (("texts", texts), ("solutions", solutions), ("pairs", pairs)):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        held_out = [pair for pair in pairs if is_held_out(prompt(document(pair)), HELD_OUT)]
        results: list[dict[str, Any]] = []
        for seed in range(1 if arguments.quick else arguments.seeds):
            finished = work / f"seed_{seed}.json"
            if not finished.exists():
                finished.write_text(json.dumps(one_seed(work, held_out, seed)))
            results.append(json.loads(finished.read_text()))
            recording.write(
                "gsm8k_preferences",
                report(results, pairs, held_out),
                {"results": results, "pairs": len(pairs), "held_out": facts(held_out)},
                folder=None if arguments.quick else recording.RESULTS,
            )


def conversations(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        record = json.loads(line)
        yield {"messages": chat(record["question"], record["answer"])}


def preferences(path: Path) -> Iterator[dict[str, Any]]:
    """As many pairs of each question as there are right or wrong solutions, whichever are fewer."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        solutions = [record[solver] for solver in SOLVERS]
        right, wrong = (
            [each["solution"] for each in solutions if each["is_correct"] == is_right] for is_right in (1, 0)
        )
        for chosen, rejected in zip(right, wrong, strict=False):
            yield {side: chat(record["question"], text) for side, text in (("chosen", chosen), ("rejected", rejected))}


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def document(pair: dict[str, Any]) -> bytes:
    """The pair as the input pipeline knows it."""
    made = chat_document(pair, "preferences")
    assert isinstance(made, str), made
    return made.encode()


def config(work: Path, name: str, seed: int) -> RunConfig:
    """One stage as a run of its own."""
    data = recipes.embedded()
    data.corpora = {
        "texts": corpus("jsonl", str(work / "texts.jsonl"), field="text"),
        "solutions": corpus("jsonl", str(work / "solutions.jsonl"), content="conversations"),
        "pairs": corpus("jsonl", str(work / "pairs.jsonl"), content="preferences"),
    }
    data.tokenizer.vocab_size = VOCABULARY
    data.cache_dir, data.validation_fraction = str(work / "cache"), HELD_OUT
    model = recipes.llama(MODEL, tie_embeddings=False, initializer="normal", initializer_range=0.05)
    model.layer_pattern = ("lightning", "lightning", "lightning", "softmax")
    length, rows, rate, objective = {
        "sft": (512, 8, 2e-3, {}),
        "dpo": (768, 4, 2e-4, {"preference": {"loss": "dpo_norm", "beta": 5.0, "reference": "cached"}}),
        "reward_model": (768, 4, 5e-4, {"reward_model": {"use_margin": False, "centring": 0.01}}),
    }[name]
    only = stage(
        passes=PASSES[name],
        warmup_share=0.1,
        context_length=length,
        rope_theta=1e4,
        mixture={"solutions" if name == "sft" else "pairs": 1.0},
        packing="best_fit",
        batch_size=batch_size(rows * length),
        optimizer=adamw(beta2=0.99, weight_decay=0.0),
        schedule=wsd(rate, 0.0),
        **objective,
    )
    run = recipes.run(f"gsm8k_{name}", model=model, data=data, stages={name: only}, laptop=True, replicate=True)
    run.seed = seed
    run.metrics.update(evaluate_every_steps=50, evaluation_batches=1000, tensorboard=False, sample_tokens=0)
    parsed, problems = parse(RunConfig, run)
    assert not problems, problems
    return parsed


def one_seed(work: Path, held_out: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The three runs of a seed and what they say of held-out questions."""
    folders = {name: work / f"{name}_{seed}" for name in PASSES}
    records = {}
    for name, folder in folders.items():
        begin = None if name == "sft" else folders["sft"]
        if code := Trainer(config(work, name, seed), folder, init_from=begin).train():
            raise RuntimeError(f"{name} ended with {code}")
        records[name] = read_metrics(folder)
    model = load_reward_model(folders["reward_model"], say=print)
    chosen, rejected = (model.scores([pair[side] for pair in held_out]) for side in ("chosen", "rejected"))
    losses = measured(records["sft"], "validation_loss")
    return {
        "seed": seed,
        "sft_loss": losses,
        "dpo_loss": measured(records["dpo"], "validation_loss"),
        "dpo_accuracy": measured(records["dpo"], "validation_accuracy"),
        "dpo_train_margin": [record["margin"] for record in records["dpo"] if "margin" in record][-1],
        "reward_loss": measured(records["reward_model"], "validation_loss"),
        "reward_right": (chosen > rejected).tolist(),
    }


def measured(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the one corpus of a run."""
    return [(record["step"], *record[name].values()) for record in records if name in record]


def by_question(held_out: Sequence[dict[str, Any]], right: Sequence[bool]) -> np.ndarray:
    """The share of a question's pairs that are right, [questions]."""
    shares: dict[str, list[bool]] = {}
    for pair, each in zip(held_out, right, strict=True):
        shares.setdefault(pair["chosen"][0]["content"], []).append(each)
    return np.array([statistics.mean(map(float, each)) for each in shares.values()])


def interval(shares: np.ndarray) -> tuple[float, float, float]:
    """Mean over questions, and the bounds of its bootstrapped 95% confidence interval."""
    drawn = np.random.default_rng(0).integers(len(shares), size=(RESAMPLES, len(shares)))
    low, high = np.quantile(shares[drawn].mean(axis=1), [0.025, 0.975])
    return float(shares.mean()), float(low), float(high)


def longer_is_right(held_out: Sequence[dict[str, Any]]) -> list[float]:
    """Of each pair whether the longer solution is the right one; 1/2 where they are equally long."""
    lengths = [[len(pair[side][-1]["content"]) for side in ("chosen", "rejected")] for pair in held_out]
    return [(np.sign(chosen - rejected) + 1) / 2 for chosen, rejected in lengths]


def facts(held_out: Sequence[dict[str, Any]]) -> dict[str, Any]:
    baseline = interval(by_question(held_out, longer_is_right(held_out)))
    return {"pairs": len(held_out), "longer_is_right": baseline}


def report(results: Sequence[dict[str, Any]], pairs: Sequence[Any], held_out: Sequence[dict[str, Any]]) -> list[str]:
    def percent(mean: float, low: float, high: float) -> str:
        return f"{mean:.1%} ({low:.1%} to {high:.1%})"

    shares = [by_question(held_out, result["reward_right"]) for result in results]
    rows = []
    for result, share in zip(results, shares, strict=True):
        (first_step, first), (_, last) = result["sft_loss"][0], result["sft_loss"][-1]
        rows.append(
            f"| {result['seed']} | {first:.3f} (step {first_step}) | {last:.3f} | {result['dpo_loss'][-1][1]:.3f} | "
            f"{result['dpo_accuracy'][-1][1]:.1%} | {result['reward_loss'][-1][1]:.3f} | {percent(*interval(share))} |"
        )
    accuracies = [result["dpo_accuracy"][-1][1] for result in results]
    return [
        "# Post-training a tiny hybrid on GSM8K",
        "",
        f"{len(pairs):,} pairs of a right and a wrong solution, {len(held_out):,} of them to {len(shares[0]):,} "
        "held-out questions; fine-tuning on worked solutions of other questions. All figures are on held-out "
        "questions. DPO begins at loss 0.693 and accuracy 50%: the policy is its reference. Intervals: 95%, "
        "bootstrapped over questions.",
        "",
        "| seed | SFT loss, first | last | DPO loss | DPO accuracy | reward model's loss | its accuracy |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Mean over the seeds: DPO accuracy {statistics.mean(accuracies):.1%}; reward model "
        f"{percent(*interval(np.mean(shares, axis=0)))}. The longer solution is the right one in "
        f"{percent(*facts(held_out)['longer_is_right'])}.",
    ]


if __name__ == "__main__":
    main()
