"""Writes puzzles as records for training, one JSON object a line.

python -m lightning_jax.rewards.puzzles --out=puzzles.jsonl --count=10000 --levels=1,2,3
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_jax.command_line import Parser, finish, say
from lightning_jax.config import nearest_name
from lightning_jax.errors import UserError
from lightning_jax.rewards.puzzles import FAMILIES, LEVELS, puzzle_records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description="Writes logic puzzles, all families and levels in turn, always the same for a seed.")
    parser.add_argument("--out", required=True, type=Path, help="the JSONL file to write")
    parser.add_argument("--count", required=True, type=int, help="how many")
    parser.add_argument("--levels", default="1,2,3,4,5", help=f"from 1, easy, to {LEVELS}, commas between")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names with commas between; without it, all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse(arguments)
    return finish(
        lambda: _write(options.out, options.count, options.levels, options.families, options.seed),
        stopped="stopped; the file is not whole",
    )


def _write(out: Path, count: int, levels: str, families: str, seed: int) -> int:
    names = families.split(",")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise UserError(f"--families: no family {unknown[0]!r}; {nearest_name(unknown[0], FAMILIES)}")
    allowed = {str(level): level for level in range(1, LEVELS + 1)}
    if unknown := [level for level in levels.split(",") if level not in allowed]:
        raise UserError(f"--levels: {unknown[0]!r} is none of {', '.join(allowed)}")
    records = puzzle_records([allowed[level] for level in levels.split(",")], seed, names)
    try:
        with out.open("w", encoding="utf-8") as file:
            for record in itertools.islice(records, count):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}") from None
    say(f"{count:,} puzzles of {len(names)} families in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
