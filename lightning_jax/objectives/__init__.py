"""What is minimised: functions of sums over tokens, so that no result depends on how a batch is split."""

from lightning_jax.objectives.next_token import NextToken, NextTokenSums

__all__ = ["NextToken", "NextTokenSums"]
