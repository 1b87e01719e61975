"""What a sample of a prompt becomes, while it grows and when it is done."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lightning_jax.generation.text import TextStream

FinishReason = Literal["stop", "length", "repetition"]
OnText = Callable[[int, int, str], None]  # the prompt's number, the sample's, and a further piece of its text


@dataclass(frozen=True)
class Completion:
    """What one sample of a prompt became.

    Attributes:
        prompt: the number of the prompt, in the order they were given, from 0.
        sample: the number of the sample, from 0.
        ids: the tokens; the last is the stop token that ended it, or the one that completed a stop text.
        log_probs: of each of them in nats, by the model at the sampling temperature (at 1 where it is 0), before
            penalty and truncation.
        finish_reason: "stop" for a stop token or stop text, "length", or "repetition".
        text: without stop token and stop text, and without an incomplete last character; None without a tokenizer.
    """

    prompt: int
    sample: int
    ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    text: str | None


@dataclass
class GrowingCompletion:
    """A sample that is being decoded."""

    prompt: int
    sample: int
    stream: TextStream | None
    on_text: OnText | None
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    shown: int = 0

    def push(self, token: int, log_prob: float, *, is_text: bool) -> bool:
        """Takes the next token; whether the sequence goes on behind it as far as its text knows."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        goes_on = self.stream is None or not is_text or self.stream.push(token)
        self._show()
        return goes_on

    def finish(self, reason: FinishReason) -> Completion:
        text = self.stream.finish() if self.stream else None
        if self.stream and self.stream.stopped:
            reason = "stop"
        self._show()
        return Completion(self.prompt, self.sample, self.ids, self.log_probs, reason, text)

    def _show(self) -> None:
        if self.on_text and self.stream and len(self.stream.text) > self.shown:
            self.on_text(self.prompt, self.sample, self.stream.text[self.shown :])
            self.shown = len(self.stream.text)
