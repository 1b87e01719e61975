"""Which corpus, and which row of it, stands at each row of a stage: exact shares of tokens that may move linearly.

Row j of a corpus is due at a random moment of the interval in which the corpus' share grows from j to j + 1 rows, and
the rows of all corpora stand in the order of their moments. So any row can be found without those before it, and at
every moment each corpus has its share, rounded down or up. After any number of rows, the count of each of k corpora
differs from its share by less than 1 + w (k - 2) rows, w being its largest weight: less than one row for two corpora.

All rows have the same length, so shares of rows are shares of tokens (of tokens and padding, with "best_fit" packing).
"""

import math
from collections.abc import Collection

import numpy as np

from lightning_jax.input_pipeline.config import MixtureConfig
from lightning_jax.input_pipeline.errors import DataError
from lightning_jax.input_pipeline.readers import nearest
from lightning_jax.input_pipeline.shuffle import fold_key, random_bits


class MixtureError(DataError):
    """A mixture that cannot be made; one line for each problem."""


class Mixture:
    """The order of corpora in a stage, a pure function of (config, num_rows, seed).

    Args:
      config: shares at the stage's start and end; only their ratios matter.
      corpora: the names there are.
      num_rows: rows of the stage, over which the shares move; after them they stay at `end`.
      seed: decides the order.

    Attributes:
      names: the corpora with a share, sorted; the others are never touched.

    Raises:
      MixtureError: a name that is no corpus, or whatever `MixtureConfig.problems` finds.
    """

    def __init__(self, config: MixtureConfig, corpora: Collection[str], num_rows: int, seed: int):
        problems = [
            f"there is no corpus {name!r}{nearest(name, corpora)}"
            for name in {**config.start, **config.end}
            if name not in corpora
        ]
        if problems := config.problems() + problems:
            raise MixtureError("\n".join(f"mixture: {problem}" for problem in problems))
        self.names = tuple(sorted(name for name in config.start if config.start[name] or config.end[name]))
        self._shares = [
            _Share(
                # fsum is exact: the order of names in the config and the Python version make no difference.
                start=config.start[name] / math.fsum(config.start.values()),
                end=config.end[name] / math.fsum(config.end.values()),
                num_rows=num_rows,
                key=fold_key("mixture", seed, name),
            )
            for name in self.names
        ]

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows first, ..., first + count - 1 of the stage.

        Returns:
          (corpus, row), int64 [count] each: an index into `names`, and the number of the row among that corpus' rows
          in this stage (0, 1, 2, ... without gaps).
        """
        corpus, row, skipped = self._in_order(first, first + count)
        wanted = slice(first - skipped, first - skipped + count)
        return corpus[wanted], row[wanted]

    def counts(self, num_rows: int) -> np.ndarray:
        """How many of the stage's first `num_rows` rows are each corpus': int64 [names]."""
        corpus, row, skipped = self._in_order(num_rows, num_rows)
        later = slice(num_rows - skipped, None)
        # The next row of a corpus has the number of those before it.
        return np.array([row[later][corpus[later] == index].min() for index in range(len(self.names))])

    def shares(self, num_rows: int) -> np.ndarray:
        """Rows each corpus should have among the first `num_rows`: float64 [names]; their sum is `num_rows`."""
        return np.array([share.due(num_rows) for share in self._shares])

    def _in_order(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, int]:
        """All rows that can stand at first, ..., stop, in order, and how many rows of the stage come before them."""
        # Counts are shares rounded, so the row at place r is due within len(names) of moment r.
        slack = len(self.names) + 1
        corpora, rows, moments, skipped = [], [], [], 0
        for index, share in enumerate(self._shares):
            begin = math.floor(share.due(max(first - slack, 0)))
            end = math.ceil(share.due(stop + slack)) + 1
            row = np.arange(begin, end)
            corpora.append(np.full(len(row), index))
            rows.append(row)
            moments.append(share.moments(row))
            skipped += begin
        order = np.argsort(np.concatenate(moments), kind="stable")
        return np.concatenate(corpora)[order], np.concatenate(rows)[order], skipped


class _Share:
    """The share of one corpus: its weight moves linearly from `start` to `end` over `num_rows`, then stays."""

    def __init__(self, start: float, end: float, num_rows: int, key: int):
        self._start, self._end, self._num_rows, self._key = start, end, num_rows, key
        self._total = num_rows * (start + end) / 2

    def due(self, moment: float) -> float:
        """The integral of the weight from 0 to `moment`."""
        inside = min(moment, self._num_rows)
        slope = (self._end - self._start) / self._num_rows
        return self._start * inside + slope * inside**2 / 2 + self._end * (moment - inside)

    def moments(self, row: np.ndarray) -> np.ndarray:
        """When the given rows of this corpus are due: `due(moment)` lies between row and row + 1. May be infinite."""
        random = (random_bits(row.astype(np.uint64) + np.uint64(self._key)) >> np.uint64(11)) + 0.5
        due = row + random * 2.0**-53
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (self._end - self._start) / self._num_rows
            inside = 2 * due / (self._start + np.sqrt(np.maximum(self._start**2 + 2 * slope * due, 0)))
            after = self._num_rows + np.maximum(due - self._total, 0) / self._end if self._end else np.inf
        return np.where(due < self._total, inside, after)
