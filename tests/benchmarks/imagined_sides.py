"""Sides of an H200 that is not there: ours takes twice the time of its floor, flash-linear-attention four times."""

from kernel_numerics import NAMES
from kernel_roofline import Case, Rates, floor
from kernel_sides import answers
from sides import Answers

H200 = {"operations": 790e12, "bytes": 4.3e12}


def seconds(implementation: str, direction: str, case: list[int]) -> float:
    if implementation == "cudnn" and case[3] > 100_000:
        raise RuntimeError("out of memory")
    return (4 if implementation.startswith("fla") else 2) * floor(Case(*case), direction, 2, Rates(**H200))


def output(implementation: str, case: list[int]) -> list[float]:
    return [1.0, 2.0]


def jax_side(threads: int) -> Answers:
    device = {
        "platform": "gpu",
        "kind": "NVIDIA H200",
        "dtype": "bfloat16",
        "auto": "pallas_gpu: the kernel for Hopper GPUs",
        "implementations": ["pallas_gpu", "xla", "cudnn"],
    }
    return {"jax": "0.11.2"}, answers(
        device=lambda: device,
        rates=lambda: H200,
        time=seconds,
        output=output,
        repeat=lambda implementation, case: True,
        numerics=lambda implementation, case, dtype: dict.fromkeys(NAMES, 1.5 if dtype == "bfloat16" else 1e-6),
    )


def torch_side(threads: int) -> Answers:
    device = {"implementations": ["fla chunk", "fla fused_chunk", "torch flash"]}
    return {"torch": "2.11.0"}, answers(device=lambda: device, time=seconds, output=output)
