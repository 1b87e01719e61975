"""Writes the report of a run again: python -m lightning_jax.metrics.report RUN_FOLDER"""

import argparse
import sys

from lightning_jax.metrics.page import write_report

__all__ = ["main", "write_report"]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lightning_jax.metrics.report", description="Writes report.html.")
    parser.add_argument("folder", metavar="RUN_FOLDER", help="folder of a run, finished, stopped or still going")
    try:
        path = write_report(parser.parse_args(arguments).folder)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
