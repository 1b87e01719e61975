"""The two processes that `kernels.py` measures in: one has jax, the other torch and flash-linear-attention.

Both are timed alike. A program makes several calls on the same random inputs, one after the other on the device: in jax
a loop inside one `jit`, in torch a CUDA graph, so that neither waits for Python. A window is some tens of milliseconds
of such programs that are queued together, and ends when the device has finished; its warm-up is not counted.
"""

import functools
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import recording
from kernel_roofline import Case, Rates, floor
from sides import Answers

WINDOW = 0.04  # seconds
PROGRAM = 1e-3  # seconds at the floor, of the calls in one program
MOST_CALLS = 32
TYPICAL = Rates(800e12, 4e12)  # only to choose the number of calls
REPEATS = 10
SLOWEST_HEAD = 0.92


class Program(NamedTuple):
    enqueue: Callable[[], None]  # returns before the device has finished
    wait: Callable[[], None]
    calls: int  # in one program


Build = Callable[[str, str, Case], Program]  # from an implementation, a direction and a case


class Stopwatch:
    """Seconds per call; keeps the programs of one case, compiled and warmed up."""

    def __init__(self, build: Build, free: Callable[[], None] = lambda: None):
        self._build, self._free = build, free
        self._case: Case | None = None
        self._programs: dict[tuple[str, str], tuple[Program, int]] = {}

    def __call__(self, implementation: str, direction: str, case: Case) -> float:
        if case != self._case:
            self._programs.clear()
            self._free()
            self._case = case
        key = implementation, direction
        if key not in self._programs:
            self._programs[key] = self._warm_up(self._build(implementation, direction, case))
        program, repeats = self._programs[key]
        if repeats > 1:
            _seconds(program, 1)  # the clock of a device that has just been idle is not its usual one
        return _seconds(program, repeats) / repeats / program.calls

    def _warm_up(self, program: Program) -> tuple[Program, int]:
        for _ in range(2):
            seconds = _seconds(program, 1)
        return program, max(1, round(WINDOW / seconds))


def _seconds(program: Program, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        program.enqueue()
    program.wait()
    return time.perf_counter() - start


def calls_of_a_program(case: Case, direction: str) -> int:
    return min(MOST_CALLS, max(1, round(PROGRAM / floor(case, direction, 2, TYPICAL))))


def inputs(case: Case) -> list[np.ndarray]:
    """q, k, v of any process alike."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((case.batch, case.length, case.heads, case.dim), np.float32) for _ in range(3)]


def slopes(heads: int) -> np.ndarray:
    """-log λ of each head: geometric between a steep head and one that forgets little."""
    return np.geomspace(SLOWEST_HEAD, 0.004, heads).astype(np.float32)


def jax_side(threads: int) -> Answers:
    """Ours and jax's own attention, on this process's default device."""
    import jax
    import jax.numpy as jnp
    import kernel_numerics
    from jax import lax

    from pallas_kernels import lightning_attention
    from pallas_kernels.dispatch import RUN

    platform = jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16

    def attention(implementation: str, case: Case) -> Callable:
        if implementation == "cudnn":
            return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        ids = jnp.broadcast_to(jnp.arange(case.length) * case.documents // case.length, (case.batch, case.length))
        return functools.partial(
            lightning_attention,
            log_decay=-jnp.asarray(slopes(case.heads)),
            segment_ids=ids if case.documents > 1 else None,
            implementation=implementation,
        )

    def once(implementation: str, direction: str, case: Case) -> Callable:
        function = attention(implementation, case)
        if direction == "forward":
            return lambda q, k, v, do: (function(q, k, v),)

        def forward_and_backward(q, k, v, do):
            o, pull_back = jax.vjp(function, q, k, v)
            return o, *pull_back(do)

        return forward_and_backward

    def build(implementation: str, direction: str, case: Case) -> Program:
        shape = (case.batch, case.length, case.heads * case.dim)
        operands = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]
        function = once(implementation, direction, case)

        def fused(*operands: jax.Array) -> Iterator[jax.Array]:
            """With heads side by side, as projections write them: on a TPU anything else is another layout."""
            results = function(*(x.reshape(*shape[:2], case.heads, case.dim) for x in operands))
            return (x.reshape(shape) for x in results)

        return repeated(fused, calls_of_a_program(case, direction), operands)

    def repeated(function: Callable, calls: int, operands: list[jax.Array]) -> Program:
        """`calls` calls, each of which waits for the one before: a number of its results is written into q, in place.

        Nothing less keeps XLA from computing only once what it is given many times.
        """

        @functools.partial(jax.jit, donate_argnums=0)
        def program(q, *others):
            def call(_, q):
                first = [x[(0,) * x.ndim].astype(jnp.float32) for x in function(q, *others)]
                return q.at[(0,) * q.ndim].set(jnp.tanh(sum(first)).astype(q.dtype))

            return lax.fori_loop(0, calls, call, q)

        def enqueue() -> None:
            operands[0] = program(*operands)

        return Program(enqueue, lambda: operands[0].block_until_ready(), calls)

    def rates() -> dict[str, float]:
        """What the device reaches: of a large matmul on random numbers, and of a copy, bytes read and written."""
        side, numbers = (1024, 2**24) if platform == "cpu" else (8192, 2**30)
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)
        w = jax.random.normal(jax.random.key(1), (side, side), dtype) / side**0.5
        y = jax.random.normal(jax.random.key(2), (numbers,), dtype)
        return {
            "operations": 2 * side**3 / fastest(lambda x, w: x @ w, x, w),
            "bytes": 2 * y.nbytes / fastest(lambda y, factor: y * factor, y, jnp.asarray(0.999, dtype)),
        }

    def fastest(function: Callable, x: jax.Array, *operands: jax.Array) -> float:
        """Seconds of one call, of ten that each take the result of the one before as x."""
        program = jax.jit(lambda x, *operands: lax.fori_loop(0, 10, lambda _, x: function(x, *operands), x))
        last = [program(x, *operands)]

        def enqueue() -> None:
            last[0] = program(last[0], *operands)

        return min(_seconds(Program(enqueue, lambda: last[0].block_until_ready(), 10), 1) for _ in range(8)) / 10

    def repeat(implementation: str, case: Case) -> bool:
        """Whether every one of several runs on the same inputs gives the same bits."""
        function = jax.jit(once(implementation, "training", case))
        shape = (case.batch, case.length, case.heads, case.dim)
        operands = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(1), 4)]
        first = function(*operands)
        same = jax.jit(lambda xs, ys: jnp.stack([(x == y).all() for x, y in zip(xs, ys, strict=True)]).all())
        return all(bool(same(first, function(*operands))) for _ in range(REPEATS))

    def output(implementation: str, case: Case) -> list[float]:
        q, k, v = (jnp.asarray(x, dtype) for x in inputs(case))
        return np.asarray(attention(implementation, case)(q, k, v), np.float64).ravel().tolist()

    ours = {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla", "cudnn"], "tpu": ["pallas_tpu", "xla"]}[platform]
    device = {
        "platform": platform,
        "kind": jax.devices()[0].device_kind,
        "dtype": jnp.dtype(dtype).name,
        "implementations": [name for name in ours if name in RUN or name == "cudnn"],
    }
    versions = recording.package_versions("jax", "jaxlib", where_installed=("jax-cuda13-plugin", "libtpu"))
    stopwatch = Stopwatch(build)
    return versions, answers(
        device=lambda: device,
        rates=rates,
        time=lambda implementation, direction, case: stopwatch(implementation, direction, Case(*case)),
        output=lambda implementation, case: output(implementation, Case(*case)),
        repeat=lambda implementation, case: repeat(implementation, Case(*case)),
        numerics=lambda implementation, case, dtype: kernel_numerics.errors(implementation, Case(*case), dtype),
    )


def torch_side(threads: int) -> Answers:
    """flash-linear-attention's two forms of the same function, and FlashAttention-2 as torch carries it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cuda = torch.cuda.is_available()
    torch.set_num_threads(threads)
    torch.set_default_device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    wait = torch.cuda.synchronize if cuda else lambda: None
    names = {"fla chunk": "chunk_simple_gla", "fla fused_chunk": "fused_chunk_simple_gla"}
    fla = importlib.import_module("fla.ops.simple_gla") if cuda and importlib.util.find_spec("fla") else None

    def attention(implementation: str, case: Case) -> Callable:
        if implementation == "torch flash":

            def flash(q, k, v):
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

            return flash
        function, log_decay = getattr(fla, names[implementation]), -torch.tensor(slopes(case.heads))
        return lambda q, k, v: function(q, k, v, g_gamma=log_decay, scale=1.0)[0]

    def build(implementation: str, direction: str, case: Case) -> Program:
        q, k, v, do = (torch.randn(case.batch, case.length, case.heads, case.dim, dtype=dtype) for _ in range(4))
        function = attention(implementation, case)
        if direction == "training":
            for x in (q, k, v):
                x.requires_grad_()

        def call() -> None:
            o = function(q, k, v)
            if direction == "training":
                torch.autograd.grad(o, (q, k, v), do)

        calls = calls_of_a_program(case, direction)
        return Program(capture(call, calls) if cuda else lambda: [call() for _ in range(calls)], wait, calls)

    def capture(call: Callable[[], None], calls: int) -> Callable[[], None]:
        """A CUDA graph of the calls, warmed up on a stream of its own as torch's documentation asks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    def output(implementation: str, case: Case) -> list[float]:
        q, k, v = (torch.tensor(x, dtype=dtype) for x in inputs(case))
        return attention(implementation, case)(q, k, v).double().flatten().tolist()

    device = {"implementations": [*(name for name in names if hasattr(fla, names[name])), "torch flash"]}
    stopwatch = Stopwatch(build, torch.cuda.empty_cache)
    return recording.package_versions("torch", where_installed=("triton", "fla-core")), answers(
        device=lambda: device,
        time=lambda implementation, direction, case: stopwatch(implementation, direction, Case(*case)),
        output=lambda implementation, case: output(implementation, Case(*case)),
    )


def answers(**functions: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Answers a question by the function that it names; what that cannot do must not end the others.

    An error of the device may have left this process without one; then it is not `usable` any more.
    """

    def answer(do: str, **fields: Any) -> dict[str, Any]:
        try:
            return {"answer": functions[do](**fields)}
        except Exception as error:
            lines = str(error).splitlines() or [""]
            usable = isinstance(error, (ValueError, TypeError, NotImplementedError, ImportError))
            return {"error": f"{type(error).__name__}: {lines[0][:200]}", "usable": usable}

    return answer
