"""Converts weights between Hugging Face's safetensors and our checkpoints, whichever --from is.

    python -m lightning_jax.convert --from=SmolLM2-135M --to=runs/smollm2_135m_released
    python -m lightning_jax.convert --from=runs/tinyllama_1.1b --to=exported/tinyllama

An imported model is a run's folder: --init_from of training, and generation and evaluation, take it. To train it in
float32 as our configs do, import it with --dtype=float32. A conversion that was interrupted goes on when it is started
again; it works in <--to>.converting, which may be deleted to start over.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_jax.command_line import Parser, finish, say
from lightning_jax.errors import UserError
from lightning_jax.import_export import export_model, import_model
from lightning_jax.model_folders import RunFolder, open_model_folder


def convert(options: argparse.Namespace) -> int:
    """All of the command. Raises UserError for what the user has to change; one line for each."""
    folder = open_model_folder(options.source, dtype=options.dtype)
    try:
        if isinstance(folder, RunFolder):
            export_model(folder, options.target, names=options.names, dtype=options.dtype, say=say)
        elif options.names:
            raise UserError(f"--names: of an export; {options.source} is to be imported, leave it out")
        else:
            import_model(folder, options.target, say=say)
    except OSError as error:
        where = error.filename or options.target
        raise UserError(f"{where}: {error.strerror}; the same command goes on from there") from None
    say(f"converted: {options.target}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake."""
    parser = Parser(prog="python -m lightning_jax.convert", description="Imports or exports a model.")
    add = parser.add_argument
    add("--from", dest="source", required=True, type=Path, metavar="PATH", help="a Hugging Face folder, or a run's")
    add("--to", dest="target", required=True, type=Path, metavar="PATH", help="a folder that does not exist yet")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights; as they are if not given")
    add("--names", choices=("released", "transformers"), help="whose config.json a MiniMax model is exported with")
    options = parser.parse_args(arguments)
    return finish(lambda: convert(options), stopped="stopped; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
