"""Generation on a CPU: tokens per second beside transformers, the cost of a token by context, and memory.

    python benchmarks/generation.py --torch-python PYTHON

PYTHON is an interpreter that has torch and transformers; the one that runs this file has lightning_jax. Three parts:

- speed: 8 prompts of 32 tokens and 256 new tokens each, greedy, float32, of the same model on the same number of
  threads, ours and transformers' `generate` taking turns. Prefilling is part of the time on both sides.
- context: a decoding step of the hybrid at 1K and at 64K tokens of context, its lightning layers and its softmax layer
  apart: the former are timed in a model without the latter.
- memory: what 100 sequences take at one time, by the arrays of their state, by the growth of the process from one
  sequence to 100, and by the config's arithmetic.

Result: benchmarks/results/generation.json and .md. `--quick` proves in two minutes that it works and writes nothing.
"""

import argparse
import itertools
import resource
import statistics
import sys
import time
from typing import Any

import recording
from models import HYBRID, LLAMA, TINY, jax_config, torch_config
from sides import Answers, Side, ratios, take_turns

ROWS, PROMPT, NEW = 8, 32, 256
CONTEXTS = (1024, 64 * 1024)
STEPS = 32  # decoding steps of one measurement
SEQUENCES, MEMORY_CAPACITY = 100, 2048
# Keys and values are shared by two heads here, as in the released models of both kinds. In those of 12M parameters no
# head shares: weights and caches exceed a processor's own memory, whose speed then sets the pace of both sides.
SMALL = {"vocab_size": 2048, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 2}
MODELS = [
    LLAMA | SMALL | {"name": "Llama, tiny", "intermediate_size": 384},
    HYBRID | SMALL | {"name": "MiniMax, tiny", "intermediate_size": 112},
    LLAMA,
    HYBRID | {"name": "MiniMax"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has torch and transformers")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements per model")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two pairs, nothing written")
    arguments = parser.parse_args()
    models, pairs, new, contexts, hybrid = MODELS, arguments.pairs, NEW, CONTEXTS, HYBRID
    if arguments.quick:
        models, pairs, new, contexts = [model | TINY for model in MODELS[:2]], 2, 16, (64, 1024)
        hybrid = HYBRID | TINY
    with (
        Side(sys.executable, jax_speed, arguments.threads) as ours,
        Side(arguments.torch_python, torch_speed, arguments.threads) as theirs,
    ):
        sides = {"lightning_jax": ours, "transformers": theirs}
        versions = {name: side.versions for name, side in sides.items()}
        speed = [compare(sides, model, new, pairs) for model in models]
    with Side(sys.executable, jax_step, arguments.threads) as side:
        context = step_costs(side, hybrid, contexts, pairs)
    memory = [memory_of(hybrid, count, arguments.threads) for count in (1, SEQUENCES)]
    recording.write(
        "generation",
        [
            "# Generation on a CPU",
            "",
            *speed_table(speed, new, pairs),
            "",
            *context_table(context),
            "",
            *memory_table(memory, hybrid),
        ],
        {"speed": speed, "context": context, "memory": memory},
        versions,
        cores=arguments.threads,
        interpreter=arguments.torch_python,
        folder=None if arguments.quick else recording.RESULTS,
    )


# Speed.


def compare(sides: dict[str, Side], model: dict[str, Any], new: int, pairs: int) -> dict[str, Any]:
    """Builds the model on both sides, then takes turns, one generation each."""
    built = {name: side.ask(model=model, new=new) for name, side in sides.items()}
    if len({answer["parameters"] for answer in built.values()}) > 1:
        raise RuntimeError(f"the two sides built different models: {built}")
    seconds = take_turns({name: side.ask for name, side in sides.items()}, pairs)
    least, median, most = ratios(seconds["transformers"], seconds["lightning_jax"])
    return {
        "model": model["name"],
        "parameters": built["lightning_jax"]["parameters"],
        "seconds": seconds,
        "tokens_per_second": {name: ROWS * new / statistics.median(times) for name, times in seconds.items()},
        "ratio": median,
        "ratio_range": [least, most],
    }


def speed_table(results: list[dict[str, Any]], new: int, pairs: int) -> list[str]:
    lines = [
        f"New tokens per second: {ROWS} prompts of {PROMPT} tokens, {new} new tokens each, greedy, float32; medians of "
        f"{pairs} pairs. Above 1 ours is faster.",
        "",
        "| model | parameters | ours | transformers | ratio (least to most of all pairs) |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        speed, (least, most) = result["tokens_per_second"], result["ratio_range"]
        lines.append(
            f"| {result['model']} | {result['parameters']:,} | {speed['lightning_jax']:,.0f} | "
            f"{speed['transformers']:,.0f} | {result['ratio']:.2f} ({least:.2f} to {most:.2f}) |"
        )
    return lines


def prompts(model: dict[str, Any]):
    import numpy as np

    return np.random.default_rng(0).integers(model["vocab_size"], size=(ROWS, PROMPT), dtype=np.int32)


def jax_speed(threads: int) -> Answers:
    """lightning_jax; XLA takes as many threads as the process may use cores."""
    import jax
    from flax import nnx

    from lightning_jax.generation import GenerationSettings, Generator, Sampling
    from lightning_jax.models import HybridLM

    generate = None

    def answer(model: dict[str, Any] | None = None, new: int = 0) -> dict[str, int] | float:
        nonlocal generate
        if model:
            config = jax_config(model)
            params = nnx.state(HybridLM(config, rngs=nnx.Rngs(0)), nnx.Param)
            generator = Generator(config, params, GenerationSettings(slots=ROWS, capacity=PROMPT + new))
            sampling = Sampling(max_new_tokens=new, temperature=0.0)

            def generate() -> None:
                completions = list(generator.generate(prompts(model), sampling))
                assert [len(completion.ids) for completion in completions] == [new] * ROWS

            generate()  # compiles
            return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
        begin = time.perf_counter()
        generate()
        return time.perf_counter() - begin

    return recording.package_versions("jax", "flax"), answer


def torch_speed(threads: int) -> Answers:
    """transformers on PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    generate = None

    def answer(model: dict[str, Any] | None = None, new: int = 0) -> dict[str, int] | float:
        nonlocal generate
        if model:
            network = transformers.AutoModelForCausalLM.from_config(torch_config(model), dtype=torch.float32).eval()
            inputs = torch.from_numpy(prompts(model)).long()
            network.generation_config.eos_token_id = None  # it could end a sequence early

            def generate() -> None:
                mask, options = torch.ones_like(inputs), {"do_sample": False, "use_cache": True, "pad_token_id": 0}
                ids = network.generate(inputs, attention_mask=mask, max_new_tokens=new, **options)
                assert ids.shape == (ROWS, PROMPT + new)

            generate()
            return {"parameters": sum(parameter.numel() for parameter in network.parameters())}
        begin = time.perf_counter()
        generate()
        return time.perf_counter() - begin

    return recording.package_versions("torch", "transformers"), answer


# The cost of a token by context.


def step_costs(side: Side, hybrid: dict[str, Any], contexts: tuple[int, int], pairs: int) -> list[dict[str, Any]]:
    """Milliseconds of a step of all rows in the hybrid and in its lightning layers alone, at each context."""
    lightning = hybrid | {"layer_pattern": ["lightning"], "num_layers": hybrid["num_layers"] * 7 // 8}
    measurements = {}
    for (name, model), context in itertools.product({"hybrid": hybrid, "lightning": lightning}.items(), contexts):
        key = f"{name} {context}"
        side.ask(key=key, model=model, context=context, capacity=max(contexts) + STEPS)
        measurements[key] = lambda key=key: side.ask(key=key)
    times = take_turns(measurements, pairs)
    results = []
    for context in contexts:
        # The least: what disturbs only adds.
        whole, part = (min(times[f"{name} {context}"]) for name in ("hybrid", "lightning"))
        results.append({"context": context, "lightning_ms": part, "softmax_ms": whole - part, "hybrid_ms": whole})
    return results


def context_table(results: list[dict[str, Any]]) -> list[str]:
    first, last = results[0], results[-1]
    return [
        f"Milliseconds of a decoding step of {ROWS} sequences by their context. The lightning layers differ by "
        f"{last['lightning_ms'] / first['lightning_ms'] - 1:+.1%} from the shortest to the longest.",
        "",
        "| context | 7 lightning layers, embedding and head | softmax layer (the rest) | hybrid |",
        "|---|---|---|---|",
        *(
            f"| {each['context']:,} | {each['lightning_ms']:.2f} | {each['softmax_ms']:.2f} | {each['hybrid_ms']:.2f} |"
            for each in results
        ),
    ]


def jax_step(threads: int) -> Answers:
    """Milliseconds of one decoding step at a context that is there already."""
    import functools

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lightning_jax.models import HybridLM

    steps = {}

    def build(model: dict[str, Any], context: int, capacity: int):
        graphdef, params = nnx.split(HybridLM(jax_config(model), rngs=nnx.Rngs(0)))
        state = nnx.merge(graphdef, params).initial_state(ROWS, capacity)

        @functools.partial(jax.jit, donate_argnums=0)
        def decode(state, params):
            network = nnx.merge(graphdef, params)
            layers = network.separate_layers()  # as generation does on a CPU

            def step(_, carry):
                state, token_B, position = carry
                positions_B1 = jnp.full((ROWS, 1), position)
                hidden_B1D, state = network.advance(token_B[:, None], positions_B1, state, separate_layers=layers)
                return state, jnp.argmax(network.logits(hidden_B1D[:, 0]), axis=-1), position + 1

            return jax.lax.fori_loop(0, STEPS, step, (state, jnp.zeros(ROWS, int), context))[:2]

        def timed() -> float:
            nonlocal state
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(decode(state, params))
            return (time.perf_counter() - begin) / STEPS * 1e3

        timed()  # compiles
        timed()
        return timed

    def answer(key: str, **model: Any) -> float | None:
        if not model:
            return steps[key]()
        steps[key] = build(**model)
        return None

    return recording.package_versions("jax", "flax"), answer


# Memory.


def memory_of(model: dict[str, Any], sequences: int, threads: int) -> dict[str, int]:
    """Of a process that generates so many sequences at one time."""
    with Side(sys.executable, jax_memory, threads) as side:
        return side.ask(model=model, sequences=sequences)


def jax_memory(threads: int) -> Answers:
    """Bytes: of the state's arrays while a generation is under way, and the most that the process had."""
    import jax
    from flax import nnx

    from lightning_jax.generation import GenerationSettings, Generator, Sampling
    from lightning_jax.models import HybridLM

    def answer(model: dict[str, Any], sequences: int) -> dict[str, int]:
        config = jax_config(model)
        params = nnx.state(HybridLM(config, rngs=nnx.Rngs(0)), nnx.Param)
        settings = GenerationSettings(slots=sequences, capacity=MEMORY_CAPACITY)
        before = sum(array.nbytes for array in jax.live_arrays())
        completions = Generator(config, params, settings).generate(
            [[number % 7, 1, 2] for number in range(sequences + 1)], Sampling(max_new_tokens=40, temperature=0.0)
        )
        next(completions)
        arrays = sum(array.nbytes for array in jax.live_arrays()) - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        per_sequence = config.state_bytes_per_sequence() + MEMORY_CAPACITY * config.kv_cache_bytes_per_token()
        return {"sequences": sequences, "arrays": arrays, "peak": peak, "computed": sequences * per_sequence}

    return recording.package_versions("jax", "flax"), answer


def memory_table(results: list[dict[str, int]], hybrid: dict[str, Any]) -> list[str]:
    one, many = results
    softmax = jax_config(hybrid | {"layer_pattern": ["softmax"]})
    more = many["sequences"] * MEMORY_CAPACITY * softmax.kv_cache_bytes_per_token()
    growth, mb = (many["peak"] - one["peak"]) / (many["computed"] - one["computed"]), 1e6
    return [
        f"Memory of sequences of up to {MEMORY_CAPACITY:,} tokens, in MB. From {one['sequences']} to "
        f"{many['sequences']} sequences the process grows by {growth:.2f} times what their states take; with softmax "
        f"attention in every layer the caches of {many['sequences']} would take {more / mb:,.0f}.",
        "",
        "| sequences | computed | arrays of the generation | peak of the process |",
        "|---|---|---|---|",
        *(
            f"| {each['sequences']} | {each['computed'] / mb:,.1f} | {each['arrays'] / mb:,.1f} | "
            f"{each['peak'] / mb:,.0f} |"
            for each in results
        ),
    ]


if __name__ == "__main__":
    main()
