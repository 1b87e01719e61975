"""Completions of a generation's prompts with their grades, before the trainer has scored them.

Shapes: P prompts of a generation, G completions of each, N = P * G rows, T tokens of a row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lightning_jax.generation import Completion
from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.reinforcement.grading import Grades
from lightning_jax.reinforcement.sampling_policy import Position, PromptPlace


@dataclass(frozen=True)
class Begun:
    """Completions of prompts that nobody has graded yet.

    Attributes:
        generation, refill: of which they are; 0 for the first prompts of a generation.
        position: behind these prompts.
        limit: of a completion's tokens.
        seconds: that the completions took.
        warnings: what somebody should know.
    """

    generation: int
    refill: int
    position: Position
    places: list[PromptPlace]
    completions: list[list[Completion]]
    limit: int
    seconds: float
    warnings: list[str]


@dataclass
class Groups:
    """Prompts with their completions and what these are worth."""

    places: list[PromptPlace]
    completions: list[list[Completion]]
    grades: Grades

    def take(self, chosen: Sequence[int]) -> "Groups":
        reasons = [self.grades.reasons[place] for place in chosen]
        grades = Grades(self.grades.reward_PG[chosen], self.grades.score_PG[chosen], reasons)
        return Groups([self.places[p] for p in chosen], [self.completions[p] for p in chosen], grades)

    def and_also(self, other: "Groups") -> "Groups":
        arrays = [np.concatenate(pair) for pair in zip(self.grades[:2], other.grades[:2], strict=True)]
        grades = Grades(*arrays, self.grades.reasons + other.grades.reasons)
        return Groups(self.places + other.places, self.completions + other.completions, grades)


@dataclass(frozen=True)
class Generated:
    """What a policy made: with a `Position`, a function of that policy and the number of the generation.

    Attributes:
        rows: of the completions [N, T], with recorded log-probabilities.
        score_PG: what each is worth; nan for none.
        used_P: prompts that are trained on.
        finished_N: completions that ended by themselves.
        position: behind this generation.
        metrics: of the generation, a function of the run.
        timing: of this machine.
        samples: the completions of the first prompts, as the record of a run keeps them.
        warnings: what somebody should know.
    """

    rows: Batch
    score_PG: np.ndarray
    used_P: np.ndarray
    finished_N: np.ndarray
    position: Position
    metrics: dict[str, float]
    timing: dict[str, float]
    samples: list[dict[str, Any]]
    warnings: list[str]

    def arrays(self) -> Batch:
        """As a file keeps it."""
        facts = {name: getattr(self, name) for name in ("metrics", "timing", "samples", "warnings")}
        own = {name: getattr(self, name) for name in ("score_PG", "used_P", "finished_N")}
        return self.rows | own | self.position.arrays() | {"facts": np.array(json.dumps(facts))}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `arrays`."""
        position, rows = Position.taken_from(arrays)
        facts = json.loads(str(rows.pop("facts")))
        own = {name: rows.pop(name) for name in ("score_PG", "used_P", "finished_N")}
        return cls(rows=rows, position=position, **own, **facts)
