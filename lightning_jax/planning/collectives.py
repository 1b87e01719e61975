"""What a compiled program sends along the axes of its mesh, read from its text.

XLA's own analysis does not tell, and counts the body of a loop once; here every collective counts as often as the loops
around it turn. Both branches of a condition count, since the text does not say which is taken.

Bytes are those that one device sends, as rings send them: of a result of R bytes among g devices an all-gather and an
all-to-all send R (g - 1) / g, an all-reduce twice that, a reduce-scatter R (g - 1), a permutation R.
"""

import collections
import math
import re
from collections.abc import Mapping

import numpy as np

SENT = {
    "all-gather": lambda size, group: size * (group - 1) / group,
    "all-to-all": lambda size, group: size * (group - 1) / group,
    "all-reduce": lambda size, group: 2 * size * (group - 1) / group,
    "reduce-scatter": lambda size, group: size * (group - 1),
    "collective-permute": lambda size, group: size,
}
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(SENT)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ENDED = re.compile(r" async-(done|update)\(")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def sent_by_axes(program: str, mesh: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    """Bytes that a device sends in one run of a program, by the mesh axes along which they go.

    Args:
        program: `compiled.as_text()`, compiled for devices in the order of the mesh.
        mesh: the size of each axis.
    """
    sent: dict[tuple[str, ...], float] = collections.defaultdict(float)
    computations, entry = _computations(program)

    def visit(name: str, times: float) -> None:
        for line in computations.get(name, ()):
            if operation := _OPERATION.search(line):
                group, axes = _group(line, mesh)
                sent[axes] += times * SENT[operation[2]](_size(operation), group)
            if _ENDED.search(line):  # names again what was started
                continue
            turns = _TURNS.search(line)
            for role, called in _CALLED.findall(line):
                visit(called, times * (int(turns[1]) if turns and role == "body" else 1))
            if branches := _BRANCHES.search(line):
                for called in branches[1].split(","):
                    visit(called.strip(" %"), times)

    visit(entry, 1)
    return {axes: size for axes, size in sent.items() if axes}


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _size(operation: re.Match[str]) -> float:
    """Bytes of a result; that of an operation that was only started holds its operand too, but for sums."""
    result, kind, started = operation.groups()
    sizes = [
        _bytes(dtype) * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in _ARRAY.findall(result)
    ]
    if started and kind != "all-reduce" and result.startswith("("):
        return sizes[1]
    return sum(sizes)


def _bytes(dtype: str) -> float:
    return 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) / 8


def _group(line: str, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """How many devices take part in a collective together, and along which axes they lie."""
    shape = tuple(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        ends = np.array([[int(end) for end in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
        source, target = (np.array(np.unravel_index(end, shape)) for end in ends.T)
        return len(ends), _names(mesh, (source != target).any(axis=1))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, sizes, order = (tuple(map(int, each.split(","))) if each else None for each in iota.groups())
        group = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(groups)[0]
    elif named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        group = _group_of_axes(*named.groups())
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = np.array([int(device) for device in listed[1].split(",")])
    else:
        group = np.arange(math.prod(shape))
    places = np.array(np.unravel_index(group, shape))
    return len(group), _names(mesh, (places != places[:, :1]).any(axis=1))


def _group_of_axes(mesh: str, axes: str) -> np.ndarray:
    """The devices of the first group of a collective along axes such as `'data','tensor':(2)4`.

    The latter are 4 places in the middle of "tensor", with 2 outer ones that are not in it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides = dict(zip(sizes, np.cumprod([1, *list(sizes.values())[:0:-1]])[::-1], strict=True))
    group = np.zeros(1, int)
    for name, outer, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part or sizes[name])
        stride = strides[name] * sizes[name] // (int(outer or 1) * count)
        group = (group[:, None] + stride * np.arange(count)).ravel()
    return group


def _names(mesh: Mapping[str, int], along: np.ndarray) -> tuple[str, ...]:
    return tuple(axis for axis, varies in zip(mesh, along, strict=True) if varies)
