"""A step of DPO on a CPU, its time and its memory: ours against TRL's DPOTrainer on PyTorch.

    python benchmarks/preference_speed.py --trl-python PYTHON

PYTHON is an interpreter that has torch, transformers and trl; the one that runs this file has lightning_jax. A step is
forward, backward, clipping and AdamW in float32, of length-normalised DPO on the same pairs with the same model and
number of threads, once with the reference's log-probabilities given ("cached"; TRL's precompute_ref_log_probs) and once
with a forward pass of the reference in every step ("live"). All chats are equally long, so that neither side pads. Each
side is a process that warms up before the clock starts; they take turns, every second pair begins with the other one.

Memory is the most that a process has resident during a step, less what it had when its libraries were imported. The
programs that XLA compiled are part of it, as PyTorch's kernels are not.

Result: benchmarks/results/preference_speed.json and .md, in under five minutes. `--quick` proves in a minute that it
works and writes nothing.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recording
from models import HYBRID, LLAMA, TINY, jax_config, torch_config
from sides import Answers, Side, ratios, take_turns

REFERENCES = ("cached", "live")
SHAPE = 8, 256  # pairs, tokens of each chat, of which half are the prompt
BETA, LEARNING_RATE, CLIP_NORM = 5.0, 1e-5, 1.0

Step = Callable[[], float]  # makes a step and returns its loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="interpreter that has torch, transformers and trl")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side per model and reference")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, nothing written")
    arguments = parser.parse_args()
    models, shape, rounds = [LLAMA, HYBRID], SHAPE, arguments.rounds
    if arguments.quick:
        models = [model | TINY | {"name": f"tiny {model['name']}"} for model in models]
        shape, rounds = (2, 32), 2
    results, versions = [], {}
    for model in models:
        for reference in REFERENCES:
            # New processes each time: what one has freed would be counted as the next one's.
            with (
                Side(sys.executable, jax_side, arguments.threads) as ours,
                Side(arguments.trl_python, trl_side, arguments.threads) as theirs,
            ):
                sides = {"lightning_jax": ours, "trl": theirs}
                versions = {name: side.versions for name, side in sides.items()}
                results.append(compare(sides, model, reference, *shape, rounds))
                print(table_row(results[-1]), flush=True)
    pairs, length = shape
    lines = [
        "# A step of DPO on a CPU",
        "",
        f"Length-normalised DPO in float32, {pairs} pairs of chats of {length} tokens, the same models on both sides, "
        f"taking turns; medians of {rounds} rounds. Above 1 ours is faster, or takes less.",
        "",
        "| model | reference | ours, ms | TRL, ms | TRL / ours (least to most) | ours, MB | TRL, MB | TRL / ours |",
        "|---|---|---|---|---|---|---|---|",
        *map(table_row, results),
    ]
    recording.write(
        "preference_speed",
        lines,
        {"results": results},
        versions,
        cores=arguments.threads,
        interpreter=arguments.trl_python,
        folder=None if arguments.quick else recording.RESULTS,
    )


def compare(
    sides: dict[str, Side], model: dict[str, Any], reference: str, pairs: int, length: int, rounds: int
) -> dict[str, Any]:
    """Builds the model on both sides, then takes turns, one step each."""
    question = {"model": model, "reference": reference, "pairs": pairs, "length": length}
    built = {name: side.ask(**question) for name, side in sides.items()}
    if len({answer["parameters"] for answer in built.values()}) > 1:
        raise RuntimeError(f"the two sides built different models: {built}")
    seconds = take_turns({name: side.ask for name, side in sides.items()}, rounds)
    least, median, most = ratios(seconds["trl"], seconds["lightning_jax"])
    memory = {name: side.ask(memory=True) for name, side in sides.items()}
    return {
        "model": model["name"],
        "parameters": built["trl"]["parameters"],
        "reference": reference,
        "pairs": pairs,
        "length": length,
        "first_loss": {name: answer["loss"] for name, answer in built.items()},
        "seconds": seconds,
        "megabytes": memory,
        "time_ratio": median,
        "time_ratio_range": [least, most],
        "memory_ratio": memory["trl"] / memory["lightning_jax"],
    }


def table_row(result: dict[str, Any]) -> str:
    ours, theirs = (1e3 * statistics.median(result["seconds"][side]) for side in ("lightning_jax", "trl"))
    (least, most), memory = result["time_ratio_range"], result["megabytes"]
    name = f"{result['model']}, {result['parameters'] / 1e6:.1f}M"
    return (
        f"| {name} | {result['reference']} | {ours:,.0f} | {theirs:,.0f} | "
        f"{result['time_ratio']:.2f} ({least:.2f} to {most:.2f}) | {memory['lightning_jax']:,.0f} | "
        f"{memory['trl']:,.0f} | {result['memory_ratio']:.2f} |"
    )


def measured(build: Callable[..., tuple[int, Step]]) -> Callable[..., Any]:
    """Builds what a question describes; answers an empty one with the seconds of a step, memory=True with megabytes."""
    step: Step
    imported = resident("VmRSS")

    def answer(memory: bool = False, **question: Any) -> dict[str, float] | float:
        nonlocal step
        if question:
            parameters, step = build(**question)
            loss = step()  # compiles
            step()
            return {"parameters": parameters, "loss": loss}
        if memory:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now
            step()
            return resident("VmHWM") - imported
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return answer


def resident(field: str) -> float:
    """Megabytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def random_pairs(model: dict[str, Any], pairs: int, length: int):
    """Token ids [pairs, 2, length]; the chats of a pair have their first half in common. 0 is left for padding."""
    import numpy as np

    ids = np.random.default_rng(0).integers(1, model["vocab_size"], size=(pairs, 2, length), dtype=np.int32)
    ids[:, 1, : length // 2] = ids[:, 0, : length // 2]
    return ids


def jax_side(threads: int) -> Answers:
    """lightning_jax, with the train step of its main job; XLA takes as many threads as the process may use cores."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lightning_jax.models import HybridLM
    from lightning_jax.objectives import Preference, PreferenceConfig
    from lightning_jax.objectives.preference import REFERENCE, segment_log_probs
    from lightning_jax.optimizers import OptimizerConfig, build_optimizer
    from lightning_jax.train_step import TrainState, make_train_step

    def build(model: dict[str, Any], reference: str, pairs: int, length: int) -> tuple[int, Step]:
        config = jax_config(model)
        graphdef, params = nnx.split(HybridLM(config, rngs=nnx.Rngs(0)))
        settings = OptimizerConfig(0.9, 0.999, 1e-8, 0.0, "all", CLIP_NORM, "float32")
        optimizer = build_optimizer(settings, lambda step: jnp.float32(LEARNING_RATE))
        ids = random_pairs(model, pairs, length).reshape(pairs, 2 * length)
        answer = np.tile(np.arange(length) >= length // 2, 2)  # of the inputs; a target is the token behind its input
        trained = np.append(answer[1:], False)
        trained[length - 1] = False  # the target there is the next chat's
        batch = {
            "inputs": ids,
            "targets": np.roll(ids, -1, axis=1),
            "segment_ids": np.tile(np.repeat(np.int32([1, 2]), length), (pairs, 1)),
            "positions": np.tile(np.arange(length, dtype=np.int32), (pairs, 2)),
            "loss_mask": np.tile(trained, (pairs, 1)),
        }
        batch = jax.tree.map(jnp.asarray, batch)
        score = jax.jit(lambda params, batch: segment_log_probs(nnx.merge(graphdef, params), config, batch)[0])
        kept = jax.tree.map(jnp.copy, params) if reference == "live" else None
        given = score(params, batch)
        objective = Preference(config, PreferenceConfig("dpo_norm", BETA, reference))
        train_step = jax.jit(
            make_train_step(graphdef, objective, optimizer, lambda step: step, first_step=0, num_micro_batches=1),
            donate_argnums=0,
        )
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

        def step() -> float:
            nonlocal state
            log_probs = given if kept is None else score(kept, batch)
            state, metrics = train_step(state, batch | {REFERENCE: log_probs})
            jax.block_until_ready(state)
            return float(metrics["loss"])

        return sum(leaf.size for leaf in jax.tree.leaves(state.params)), step

    return recording.package_versions("jax", "flax", "optax"), measured(build)


def trl_side(threads: int) -> Answers:
    """TRL's DPOTrainer: its collator, its loss and its reference."""
    import datasets
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def build(model: dict[str, Any], reference: str, pairs: int, length: int) -> tuple[int, Step]:
        # Every id is a word of its own, so that text is what the ids were; with brackets, because the special ones are
        # looked for inside of words too.
        words = {f"<{token}>": token for token in range(model["vocab_size"])}
        backend = Tokenizer(models.WordLevel(words, unk_token="<0>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<0>", eos_token="<1>")

        def text(ids) -> str:
            return " ".join(f"<{token}>" for token in ids)

        half = length // 2
        records = [
            # TRL puts the end token behind an answer.
            {"prompt": text(c[:half]), "chosen": " " + text(c[half:-1]), "rejected": " " + text(r[half:-1])}
            for c, r in random_pairs(model, pairs, length)
        ]
        network = transformers.AutoModelForCausalLM.from_config(torch_config(model), dtype=torch.float32)
        settings = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            beta=BETA,
            loss_type="sigmoid_norm",
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=pairs,
            max_length=length,
            precompute_ref_log_probs=reference == "cached",
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            network,
            ref_model=copy.deepcopy(network) if reference == "live" else None,
            args=settings,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
        )
        network = trainer.model.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        batch = next(iter(trainer.get_train_dataloader()))
        if tuple(batch["input_ids"].shape) != (2 * pairs, length):
            raise RuntimeError(f"TRL's batch is {tuple(batch['input_ids'].shape)}, not {(2 * pairs, length)}")

        def step() -> float:
            loss = trainer.compute_loss(network, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return sum(parameter.numel() for parameter in network.parameters()), step

    return recording.package_versions("torch", "transformers", "trl"), measured(build)


if __name__ == "__main__":
    main()
