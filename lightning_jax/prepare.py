"""Prepares a config's tokenizer and token stores ahead of training, on a machine with many cores and no accelerator.

python -m lightning_jax.prepare --config=configs/tinyllama.py:1.1b --processes=32 --corpora=slimpajama
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from lightning_jax.command_line import run_command
from lightning_jax.config import RunConfig, nearest_name
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import Progress, prepare, prepare_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tokenizes corpora into the cache, from which training reads them.")
    parser.add_argument("--processes", type=int, default=1, help="parts of a corpus tokenized at once")
    parser.add_argument("--corpora", default="", help="names with commas between; without it, all of the config")
    return run_command(parser, _prepare, arguments)


def _prepare(arguments: argparse.Namespace, config: RunConfig) -> int:
    chosen = arguments.corpora.split(",") if arguments.corpora else list(config.data.corpora)
    if unknown := [name for name in chosen if name not in config.data.corpora]:
        raise UserError(f"--corpora: no corpus {unknown[0]!r}; {nearest_name(unknown[0], config.data.corpora)}")
    # The tokenizer may be trained on all corpora, whichever are prepared now.
    tokenizer = prepare_tokenizer(config.data)
    data = dataclasses.replace(config.data, corpora={name: config.data.corpora[name] for name in chosen})
    for corpus in prepare(data, tokenizer, processes=arguments.processes, progress=_tell).values():
        print(f"corpus {corpus}")
        print(f"  {corpus.train.folder.parent}")
    return 0


def _tell(progress: Progress) -> None:
    if sys.stdout.isatty():
        parts = f"{progress.parts_done}/{progress.parts} parts"
        print(f"\r{progress.corpus}: {parts}, {progress.tokens:,} tokens", end="", flush=True)
        if progress.parts_done == progress.parts:
            print()


if __name__ == "__main__":
    sys.exit(main())
