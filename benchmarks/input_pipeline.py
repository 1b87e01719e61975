"""How many tokens per second the input pipeline delivers: packing, mixing and reading ahead, without a model.

    python benchmarks/input_pipeline.py

Corpora of random tokens in documents of lengths like those of web text (log-normal, median 400 tokens) lie in token
stores on disk; batches of 131,072 tokens are made from 1, 2 and 10 of them. "direct" calls batches[step] in one thread,
"read ahead" iterates as training does. Each figure is the median of several rounds. Takes about two minutes; writes
benchmarks/results/input_pipeline.md and .json.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import recording

from lightning_jax.input_pipeline.batches import GlobalBatches
from lightning_jax.input_pipeline.config import MixtureConfig
from lightning_jax.input_pipeline.packing import Batch, BestFitRows
from lightning_jax.input_pipeline.token_store import TokenStore, TokenStoreWriter
from lightning_jax.optimizers.batch_size import BatchSizes
from lightning_jax.optimizers.config import BatchSizeConfig

BATCH_TOKENS = 131_072
STEPS_PER_ROUND = 24


def make_store(folder: Path, num_documents: int, seed: int) -> TokenStore:
    """A corpus whose documents have log-normal lengths of median 400 tokens."""
    random = np.random.default_rng(seed)
    lengths = np.maximum(random.lognormal(6.0, 1.2, num_documents).astype(np.int64), 2)
    with TokenStoreWriter(folder, vocab_size=50_000) as writer:
        for part in np.array_split(lengths, 16):
            writer.append_documents(random.integers(0, 50_000, part.sum()), part)
    return TokenStore.open(folder)


def tokens_per_second(batches: GlobalBatches, rounds: int) -> dict[str, float]:
    """Median over rounds, for one thread asking for steps and for the iterator that training uses."""
    direct = _median_rate(map(batches.__getitem__, itertools.count()), rounds)
    with contextlib.closing(batches.iterator(0)) as iterator:
        return {"direct": direct, "read_ahead": _median_rate(iterator, rounds)}


def _median_rate(batches: Iterator[Batch], rounds: int) -> float:
    rates = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(STEPS_PER_ROUND):
            next(batches)
        rates.append(STEPS_PER_ROUND * BATCH_TOKENS / (time.perf_counter() - begin))
    return statistics.median(rates[1:])  # the first round warms up and fills the buffers


def measure(rounds: int, documents: int) -> tuple[list[dict], list[dict]]:
    """(throughput by packing, context length and number of corpora; packing of a million documents)."""
    throughput, packing = [], []
    with tempfile.TemporaryDirectory() as folder:
        stores = {f"corpus_{i}": make_store(Path(folder) / f"corpus_{i}", documents, seed=i) for i in range(10)}
        million = make_store(Path(folder) / "million", 1_000_000, seed=10)
        for context_length in (512, 2048, 8192):
            begin = time.perf_counter()
            rows = BestFitRows(million, context_length)
            seconds = time.perf_counter() - begin
            packing.append({"context_length": context_length, "seconds": seconds, "rows": len(rows), "fill": rows.fill})
            for kind in ("split", "best_fit"):
                for count in (1, 2, 10):
                    weights = {name: 1.0 + i for i, name in enumerate(list(stores)[:count])}
                    sizes = BatchSizeConfig(tokens=(BATCH_TOKENS,), starts=(0,), micro_batch_tokens=0)
                    batches = GlobalBatches(
                        stores,
                        MixtureConfig(weights, weights, kind),
                        BatchSizes(sizes, context_length, tokens=10**10),
                        context_length,
                        seed=0,
                    )
                    measured = tokens_per_second(batches, rounds)
                    throughput.append({"packing": kind, "context_length": context_length, "corpora": count, **measured})
                    print(throughput[-1], file=sys.stderr)
    return throughput, packing


def report(throughput: list[dict], packing: list[dict], rounds: int, documents: int) -> list[str]:
    """The results as Markdown."""
    lines = [
        "# Input pipeline: tokens delivered per second",
        "",
        f"Batches of {BATCH_TOKENS:,} tokens; median of {rounds} rounds of {STEPS_PER_ROUND} batches; "
        f"10 corpora of {documents:,} documents each.",
        "",
        "| packing | context | corpora | direct, Mtok/s | read ahead, Mtok/s |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in throughput:
        lines.append(
            f"| {row['packing']} | {row['context_length']:,} | {row['corpora']} "
            f"| {row['direct'] / 1e6:.1f} | {row['read_ahead'] / 1e6:.1f} |"
        )
    lines += [
        "",
        "Best-fit packing of one million documents (done once per store and context length, then kept on disk):",
        "",
        "| context | seconds | rows | share of rows that is not padding |",
        "|---:|---:|---:|---:|",
    ]
    for row in packing:
        lines.append(f"| {row['context_length']:,} | {row['seconds']:.2f} | {row['rows']:,} | {row['fill']:.5f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=20_000, help="per corpus")
    parser.add_argument("--output", type=Path, default=recording.RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    throughput, packing = measure(arguments.rounds, arguments.documents)
    recording.write(
        "input_pipeline",
        report(throughput, packing, arguments.rounds, arguments.documents),
        {
            "rounds": arguments.rounds,
            "documents": arguments.documents,
            "throughput": throughput,
            "packing": packing,
        },
        {"lightning_jax": recording.package_versions("grain", "numpy")},
        folder=arguments.output,
    )


if __name__ == "__main__":
    main()
