"""Reinforcement learning: prompts into rollouts, rollouts into rewards and advantages, several updates on each."""
