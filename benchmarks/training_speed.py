"""Training speed on a CPU, in tokens per second: ours against Hugging Face transformers on PyTorch.

    python benchmarks/training_speed.py --torch-python PYTHON

PYTHON is an interpreter that has torch and transformers; the one that runs this file has lightning_jax. A step is
forward, backward and AdamW in float32, of the same model on the same batch and number of threads. Each side is a
process that compiles and warms up before the clock starts; asked, it makes a step to warm up again and times the next.
They take turns, and every second pair begins with the other one. PyTorch runs eagerly, as transformers trains by
default, with its fused attention and fused AdamW. Both are given huge pages (benchmarks/sides.py).

Between the steps a third process times one matrix product of the models' sizes in XLA: the arithmetic that a step
needs, over its time, as a share of that product's rate says how far either side is from what the processor can do.

Result: benchmarks/results/training_speed.json and .md. `--quick` proves in a minute that it works and writes nothing.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import recording
from models import HYBRID, LLAMA, TINY, jax_config, torch_config
from sides import Answers, Side, ratios, take_turns

SHAPES = ((8, 512), (1, 8192))  # rows, tokens of each
SHAPE = (8192, 256, 1024)  # of the matrix product
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 0.1

Step = Callable[[], float]  # makes a step and returns its loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has torch and transformers")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements per model and shape")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two pairs, nothing written")
    arguments = parser.parse_args()
    models, shapes, pairs = [LLAMA, HYBRID], SHAPES, arguments.pairs
    if arguments.quick:
        models = [model | TINY | {"name": f"tiny {model['name']}"} for model in models]
        shapes, pairs = ((2, 64), (1, 256)), 2
    results = []
    with (
        Side(sys.executable, jax_side, arguments.threads) as ours,
        Side(arguments.torch_python, torch_side, arguments.threads) as theirs,
        Side(sys.executable, product_side, arguments.threads) as product,
    ):
        sides = {"lightning_jax": ours, "transformers": theirs, "product": product}
        for model in models:
            for rows, length in shapes:
                results.append(compare(sides, model, rows, length, pairs))
                print(table_row(results[-1]), flush=True)
    lines = [
        "# Training speed on a CPU",
        "",
        "Forward, backward and AdamW in float32, the same model and batch on both sides, taking turns; medians of "
        f"{pairs} pairs. Above 1 ours is faster.",
        "",
        "| model | parameters | batch | ours, tokens/s | transformers, tokens/s | ratio (least to most of all pairs) | "
        "a matrix product, GFLOP/s | ours, share of it | transformers, share |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(table_row, results),
    ]
    recording.write(
        "training_speed",
        lines,
        {"results": results},
        {name: sides[name].versions for name in ("lightning_jax", "transformers")},
        cores=arguments.threads,
        interpreter=arguments.torch_python,
        folder=None if arguments.quick else recording.RESULTS,
    )


def compare(sides: dict[str, Side], model: dict[str, Any], rows: int, length: int, pairs: int) -> dict[str, Any]:
    """Builds the model on both sides, then takes turns, one step each."""
    built = {name: side.ask(model=model, rows=rows, length=length) for name, side in sides.items()}
    product = built.pop("product")
    parameters = {answer["parameters"] for answer in built.values()}
    if len(parameters) > 1:
        raise RuntimeError(f"the two sides built different models: {built}")
    seconds = take_turns({name: side.ask for name, side in sides.items()}, pairs)
    least, median, most = ratios(seconds["transformers"], seconds["lightning_jax"])
    rate = product["product_flops"] / statistics.median(seconds.pop("product"))
    return {
        "model": model["name"],
        "parameters": parameters.pop(),
        "rows": rows,
        "length": length,
        "first_loss": {name: answer["loss"] for name, answer in built.items()},
        "seconds": seconds,
        "tokens_per_second": {name: rows * length / statistics.median(times) for name, times in seconds.items()},
        "ratio": median,
        "ratio_range": [least, most],
        "product_flops_per_second": rate,
        "share_of_product": {
            name: product["step_flops"] / statistics.median(times) / rate for name, times in seconds.items()
        },
    }


def table_row(result: dict[str, Any]) -> str:
    speed, (least, most) = result["tokens_per_second"], result["ratio_range"]
    share = result["share_of_product"]
    return (
        f"| {result['model']} | {result['parameters']:,} | {result['rows']} x {result['length']:,} | "
        f"{speed['lightning_jax']:,.0f} | {speed['transformers']:,.0f} | "
        f"{result['ratio']:.2f} ({least:.2f} to {most:.2f}) | {result['product_flops_per_second'] / 1e9:,.0f} | "
        f"{share['lightning_jax']:.0%} | {share['transformers']:.0%} |"
    )


def timed(build: Callable[..., tuple[int, Step]]) -> Callable[..., Any]:
    """Builds what a question describes; answers an empty one with the seconds of a step."""
    step: Step

    def answer(**question: Any) -> dict[str, float] | float:
        nonlocal step
        if question:
            parameters, step = build(**question)
            loss = step()  # compiles
            step()
            return {"parameters": parameters, "loss": loss}
        step()  # while the other side ran, a virtual machine gave this one's free memory back to its host
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return answer


def random_tokens(model: dict[str, Any], rows: int, length: int):
    import numpy as np

    return np.random.default_rng(0).integers(model["vocab_size"], size=(rows, length + 1), dtype=np.int32)


def jax_side(threads: int) -> Answers:
    """lightning_jax; XLA takes as many threads as the process may use cores."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from lightning_jax.models import HybridLM
    from lightning_jax.objectives import NextToken

    def build(model: dict[str, Any], rows: int, length: int) -> tuple[int, Step]:
        objective = NextToken(jax_config(model))
        graphdef, params = nnx.split(HybridLM(objective.config, rngs=nnx.Rngs(0)))
        optimizer = optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=WEIGHT_DECAY)
        tokens = jnp.asarray(random_tokens(model, rows, length))
        batch = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": jnp.ones((rows, length), jnp.int32),
            "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
            "loss_mask": jnp.ones((rows, length), bool),
        }

        def train_step(params: nnx.State, opt_state: optax.OptState, batch: dict[str, jax.Array]):
            def loss(params: nnx.State) -> jax.Array:
                return objective.loss(objective.sums(nnx.merge(graphdef, params), batch))[0]

            value, gradients = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        compiled = jax.jit(train_step, donate_argnums=(0, 1))
        state = params, optimizer.init(params)

        def step() -> float:
            nonlocal state
            *state, loss = compiled(*state, batch)
            jax.block_until_ready(state)
            return float(loss)

        return sum(leaf.size for leaf in jax.tree.leaves(params)), step

    return recording.package_versions("jax", "flax", "optax"), timed(build)


def torch_side(threads: int) -> Answers:
    """transformers on PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def build(model: dict[str, Any], rows: int, length: int) -> tuple[int, Step]:
        network = transformers.AutoModelForCausalLM.from_config(torch_config(model), dtype=torch.float32).train()
        network.config.use_cache = False
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )
        tokens = torch.from_numpy(random_tokens(model, rows, length)).long()
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def step() -> float:
            loss = network(input_ids=inputs, labels=targets, shift_labels=targets).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return sum(parameter.numel() for parameter in network.parameters()), step

    return recording.package_versions("torch", "transformers"), timed(build)


def product_side(threads: int) -> Answers:
    """A product [T, D] x [D, 4D] in XLA, as often as takes half a second, and the arithmetic of a step beside it."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)
    repetitions = 64

    def answer(**question: Any) -> dict[str, float] | float:
        if question:
            model, rows, length = question["model"], question["rows"], question["length"]
            step_flops = jax_config(model).flops_per_token(length, "model") * rows * length
            return {"product_flops": repetitions * 2 * math.prod(SHAPE), "step_flops": step_flops}
        left, right = jnp.ones(SHAPE[:2]), jnp.ones(SHAPE[1:])
        multiply(left, right).block_until_ready()
        begin = time.perf_counter()
        for _ in range(repetitions):
            multiply(left, right).block_until_ready()
        return time.perf_counter() - begin

    return recording.package_versions("jax"), answer


if __name__ == "__main__":
    main()
