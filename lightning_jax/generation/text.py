"""From token ids to text while they come: whole characters only, and stop texts wherever tokens cut them.

A character of UTF-8 may be spread over several tokens, and a tokenizer may write a token differently at the beginning
of a text (SentencePiece drops a leading space there), so a token cannot be decoded alone.
"""

from collections.abc import Sequence

from lightning_jax.input_pipeline import Tokenizer

UNDECODABLE = "\ufffd"
LONGEST_CHARACTER = 4  # bytes, and so tokens


class TextStream:
    """The text of one sequence of tokens, which ends at the first of `stop`.

    Attributes:
        text: what is decided so far, without the stop text; it only grows.
        stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context: list[int] = []  # the last decoded tokens, before which the undecided ones are decoded
        self._undecided: list[int] = []
        self._decoded = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> bool:
        """Takes the next token; whether the sequence goes on behind it."""
        self._undecided.append(token)
        new = self._decode(self._undecided)
        if not new:
            self._undecided.clear()  # special tokens are no text
        elif not new.endswith(UNDECODABLE):
            self._decide(new, len(self._undecided))
        elif len(self._undecided) >= LONGEST_CHARACTER:
            # No token that may come can still complete what the first one began.
            self._decide(self._decode(self._undecided[:1]), 1)
        return not self.stopped

    def finish(self) -> str:
        """The whole text, where no more tokens come; an incomplete last character is left out."""
        if not self.stopped:
            self._decide(self._decode(self._undecided).rstrip(UNDECODABLE), len(self._undecided))
        if not self.stopped:
            self.text = self._decoded
        return self.text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(self._context + tokens)[len(self._tokenizer.decode(self._context)) :]

    def _decide(self, text: str, num_tokens: int) -> None:
        self._decoded += text
        self._context, self._undecided = self._undecided[:num_tokens], self._undecided[num_tokens:]
        self._find_stop()

    def _find_stop(self) -> None:
        """Looks for a stop text in what is new, and decides everything that cannot be the beginning of one."""
        found = [place for stop in self._stop if (place := self._decoded.find(stop, len(self.text))) >= 0]
        if found:
            self.stopped, self.text = True, self._decoded[: min(found)]
            return
        undecided = max((_overlap(self._decoded[len(self.text) :], stop) for stop in self._stop), default=0)
        self.text = self._decoded[: len(self._decoded) - undecided]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
