"""What the optimizer does: AdamW's numbers, the learning-rate schedule and the batch size over time."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """A learning rate as a function of the stage's step; lengths are in steps of the stage.

    "wsd" (arXiv 2404.06395) warms up linearly from 0, holds `peak`, and falls to `final` over the stage's last
    `decay_steps`. With its shape "exponential" it is MiniMax-Text-01's constant-then-exponential, without warm-up
    MiniMax-M1's constant-then-decay. "cosine" falls from the end of warm-up to step `decay_steps`. "constant" never
    falls.
    """

    kind: Literal["wsd", "cosine", "constant"]
    peak: float
    final: float  # "constant": equal to peak
    warmup_steps: int
    decay_steps: int  # "wsd": length of the fall; "cosine": the step at which it ends; "constant": 0
    decay_shape: Literal["linear", "cosine", "sqrt", "exponential"]  # "wsd" only
    first_step: int  # the schedule's step at which the stage begins; above 0 where one schedule spans several stages

    def problems(self) -> list[str]:
        found = []
        if self.peak <= 0:
            found.append(f"peak: {self.peak} is not positive")
        if not 0 <= self.final <= self.peak:
            found.append(f"final: {self.final} is not between 0 and peak={self.peak}")
        for field in ("warmup_steps", "decay_steps", "first_step"):
            if getattr(self, field) < 0:
                found.append(f"{field}: {getattr(self, field)} is negative; 0 for none")
        if self.kind == "wsd" and self.decay_shape == "exponential" and self.final <= 0:
            found.append(f"final: {self.final} is never reached exponentially; make it positive or change decay_shape")
        if self.kind == "cosine" and self.decay_steps <= self.warmup_steps:
            found.append(
                f"decay_steps: the cosine ends at step {self.decay_steps}, within warmup_steps={self.warmup_steps}; "
                "make it larger"
            )
        if self.kind == "constant" and (self.final != self.peak or self.decay_steps):
            found.append('kind: "constant" never falls; make final equal to peak and decay_steps 0, or take "wsd"')
        return found

    def problems_in(self, num_steps: int) -> list[str]:
        """What is wrong with the schedule in a stage of so many steps."""
        end = self.first_step + num_steps
        if self.kind == "wsd" and self.warmup_steps + self.decay_steps > end:
            return [
                f"decay_steps: {self.decay_steps} after warmup_steps={self.warmup_steps} do not fit into {end} steps; "
                "shorten them or give the stage more tokens"
            ]
        return []


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with global-norm clipping."""

    beta1: float
    beta2: float
    epsilon: float  # added to the square root of the second moment; 1e-15 in MiniMax-M1
    weight_decay: float
    decay_mask: Literal["all", "matrices"]  # matrices: no decay on norms and other vectors
    clip_norm: float  # 0 for none
    moment_dtype: Literal["float32", "bfloat16"]  # bfloat16: second moments stall where beta2 is above about 0.996

    def problems(self) -> list[str]:
        found = [
            f"{field}: {getattr(self, field)} is not in [0, 1)"
            for field in ("beta1", "beta2")
            if not 0 <= getattr(self, field) < 1
        ]
        if self.epsilon < 1e-15:
            found.append(
                f"epsilon: {self.epsilon} is too small for float32, whose second moments vanish below gradients of "
                "about 1e-18; 1e-15 is the least that hides it"
            )
        found += [
            f"{field}: {getattr(self, field)} is negative; 0 for none"
            for field in ("weight_decay", "clip_norm")
            if getattr(self, field) < 0
        ]
        return found


@dataclass(frozen=True)
class BatchSizeConfig:
    """Tokens per step, growing at given counts of the stage's consumed tokens (Text-01: 16M to 128M)."""

    tokens: tuple[int, ...]  # batch sizes in tokens
    starts: tuple[int, ...]  # tokens consumed at which each begins; the first is 0
    micro_batch_tokens: int  # most tokens that one shard of the batch has in one forward pass; 0: all of its share

    def problems(self) -> list[str]:
        found = []
        if not self.tokens or min(self.tokens) < 1:
            found.append(f"tokens: {list(self.tokens)} are not positive batch sizes")
        if len(self.tokens) != len(self.starts):
            found.append(f"starts: {len(self.starts)} of them for {len(self.tokens)} batch sizes; one each")
        if self.starts[:1] != (0,) or list(self.starts) != sorted(set(self.starts)):
            found.append(f"starts: {list(self.starts)} does not rise from 0")
        if self.micro_batch_tokens < 0:
            found.append(f"micro_batch_tokens: {self.micro_batch_tokens} is negative; 0 for the whole batch")
        return found
