"""How fast a generator is, prompts and completions apart."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_jax.generation import decoding


@dataclass
class Speed:
    """Tokens so far and the seconds they took; calls that compiled are counted apart, and their tokens not at all."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self, phase: Literal["prefill", "decode"]) -> Iterator[Callable[[int], None]]:
        """Times what is inside, whose tokens are to be told to what it gets."""
        tokens: list[int] = []
        compiled, begin = decoding.compilations(), time.perf_counter()
        yield tokens.append
        seconds = time.perf_counter() - begin
        if decoding.compilations() > compiled:
            self.compile_seconds += seconds
        elif phase == "prefill":
            self.prefill_tokens += sum(tokens)
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += sum(tokens)
            self.decode_seconds += seconds
