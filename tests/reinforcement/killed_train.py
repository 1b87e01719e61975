"""The training command, killed by itself: the environment's KILL_AT, "decode 3", says at the end of what and of which.

decode is a call of the decoding loop, in the middle of a generation; update a step that the devices have begun; sync a
file of rollouts or of a checkpoint that has been made durable, before what it belongs to is whole.
"""

import os
import signal
import sys
from collections.abc import Callable

from lightning_jax import train
from lightning_jax.generation import decoding
from lightning_jax.programs import Programs


def killing(call: Callable, count: int) -> Callable:
    """The call, of which this process does not survive number `count`."""
    numbers = iter(range(1, count))

    def wrapped(*arguments, **named):
        result = call(*arguments, **named)
        if next(numbers, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


if __name__ == "__main__":
    kind, count = os.environ["KILL_AT"].split()
    match kind:
        case "decode":
            cache_size = decoding.decode._cache_size
            decoding.decode = killing(decoding.decode, int(count))
            decoding.decode._cache_size = cache_size
        case "update":
            train_step = Programs.train_step
            Programs.train_step = lambda *arguments: killing(train_step(*arguments), int(count))
        case "sync":
            os.fsync = killing(os.fsync, int(count))
    sys.exit(train.main())
