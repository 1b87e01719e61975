"""What was generated, as the trainer sees it: its own log-probabilities beside those recorded, and advantages.

The policy that scores may have been trained since the completions were made.

Source: the correlation of probabilities, MiniMax-M1 (arXiv 2506.13585) figure 3.

Shapes: P prompts of a generation, G completions of each, N = P * G rows, T tokens of a row.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from lightning_jax.generation import log_prob_gap
from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.objectives.advantages import group_advantages
from lightning_jax.objectives.policy_gradient import ADVANTAGES, OLD, RECORDED, REFERENCE, kl_estimate
from lightning_jax.objectives.value import VALUES
from lightning_jax.programs import Programs
from lightning_jax.reinforcement.credit import with_credit, with_value_mask
from lightning_jax.reinforcement.experience import with_advantages
from lightning_jax.reinforcement.generated import Generated
from lightning_jax.stages import Stage


@dataclass(frozen=True)
class Collected:
    """A generation.

    Attributes:
        rows: to train on [N, T].
        metrics: of the generation, a function of the run.
        timing: of this machine.
        samples: some of the completions, as the record of a run keeps them.
        warnings: what somebody should know.
    """

    rows: Batch
    metrics: dict[str, float]
    timing: dict[str, float]
    samples: list[dict[str, Any]]
    warnings: list[str]

    @property
    def summary(self) -> str:
        """The generation in a line."""
        metrics, timing = self.metrics, self.timing
        return (
            f"reward {metrics['reward']:.3f}, {metrics['completion_tokens']:.1f} tokens, "
            f"{metrics['equal_reward_groups']:.0%} of prompts with equal rewards, {metrics['refills']} refills; "
            f"{timing['generation_seconds']:.1f} s generation, {timing['reward_seconds']:.1f} s reward, "
            f"{timing['scoring_seconds']:.1f} s scoring"
        )


class Scorer:
    """Scores the generations of a stage."""

    def __init__(self, stage: Stage, programs: Programs):
        self._stage, self._settings, self._programs = stage, stage.config.reinforcement, programs
        self._log_probs = programs.policy_log_prob_step(stage)
        self._values = programs.value.step(stage) if self._settings.value else None

    def collected(
        self,
        generation: int,
        generated: Generated,
        params: nnx.State,
        reference: nnx.State | None = None,
        value: nnx.State | None = None,
    ) -> Collected:
        """What was generated, scored by the trainer as it is now.

        Args:
            params: of the policy, which may have been trained since.
            reference: the model as the stage began, where the objective asks for it.
            value: of the value model, where there is one.
        """
        begin = time.perf_counter()
        settings, rows, score_PG = self._settings, generated.rows, generated.score_PG
        if settings.value:
            rows = with_value_mask(rows, generated.finished_N, settings.value)
        rows = self._scored(rows, params, reference, value)
        gap = log_prob_gap(rows[RECORDED], rows[OLD], rows["loss_mask"])
        metrics = generated.metrics | {name: float(each) for name, each in gap.items()}
        metrics["padding_share"] = float(np.mean(rows["segment_ids"] == 0))
        divergence_NT = self._divergence(rows)
        if settings.value:
            used_PG = np.where(generated.used_P[:, None], score_PG, np.nan)
            rows = with_credit(rows, used_PG.reshape(-1), divergence_NT, settings.value)
        else:
            total_PG = np.sum(divergence_NT, axis=1).reshape(score_PG.shape)
            advantages_PG = group_advantages(score_PG - total_PG, settings.advantages)
            rows = with_advantages(rows, advantages_PG, generated.used_P)
        seconds = time.perf_counter() - begin
        rate = int(np.sum(generated.rows["loss_mask"])) / max(seconds, 1e-9)
        timing = generated.timing | {"scoring_seconds": seconds, "scored_tokens_per_second": rate}
        advantage_N = np.sum(rows[ADVANTAGES], axis=1) / np.maximum(np.sum(rows["loss_mask"], axis=1), 1)
        logged = [
            sample | {"advantage": float(advantage)}
            for sample, advantage in zip(generated.samples, advantage_N[: len(generated.samples)], strict=True)
        ]
        warnings = generated.warnings + self._alarms(generation, metrics)
        return Collected(rows, metrics, timing, logged, warnings)

    def _scored(self, rows: Batch, params: nnx.State, reference: nnx.State | None, value: nnx.State | None) -> Batch:
        """The rows with the log-probabilities of the trainer as it is, and of the reference, and with values."""
        programs = self._programs
        rows = rows | {OLD: programs.by_rows(self._stage, self._log_probs, programs.weights(params), rows)}
        if reference is not None:
            weights = programs.weights(reference)
            rows[REFERENCE] = programs.by_rows(self._stage, self._log_probs, weights, rows)
        if self._values:
            rows[VALUES] = programs.by_rows(self._stage, self._values, value, rows)
        return rows

    def _divergence(self, rows: Batch) -> np.ndarray:
        """What is taken off the reward of each token [N, T]."""
        settings, mask_NT = self._settings.policy_gradient, rows["loss_mask"]
        if not settings.kl_coefficient or settings.kl_in != "reward":
            return np.zeros(mask_NT.shape)
        each_NT = np.asarray(kl_estimate(settings.kl_estimator, rows[OLD], rows[REFERENCE]))
        return settings.kl_coefficient * np.where(mask_NT, each_NT, 0)

    def _alarms(self, generation: int, metrics: Mapping[str, float]) -> list[str]:
        """Where the trainer's probabilities are not those of the rollouts as they should be."""
        rollouts, warnings = self._settings.rollouts, []
        if metrics["probability_correlation"] < rollouts.correlation_alarm:
            warnings.append(
                f"generation {generation + 1}: probabilities of rollouts and trainer correlate by "
                f"{metrics['probability_correlation']:.4f}, below {rollouts.correlation_alarm}; see "
                "lightning_jax/generation/README.md for modes in which they are nearer"
            )
        if rollouts.mode == "exact" and not rollouts.staleness and metrics["log_prob_gap_max"]:
            warnings.append(
                f"generation {generation + 1}: log-probabilities of exact rollouts are up to "
                f"{metrics['log_prob_gap_max']:.1e} nats from the trainer's; here its forward depends on what shares "
                "a batch"
            )
        return warnings
