"""A side that ends, hangs or refuses when asked to."""

import os
import time

from kernel_sides import answers
from sides import Answers


def refuse() -> None:
    raise NotImplementedError("not for heads of 96\nand more lines")


def failing_side(threads: int) -> Answers:
    return {"python": "3"}, answers(
        process=lambda implementation=None: os.getpid(),
        refuse=refuse,
        crash=lambda: 1 // 0,
        end=lambda implementation=None: os._exit(1),
        hang=lambda: time.sleep(60),
    )
