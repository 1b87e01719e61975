"""Puzzles of statements: knights and knaves, zebra, satisfiability, goods exchange, word sorting, brackets, ciphers,
directions."""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_jax.rewards.puzzles.core import Made, read_integers, read_pairs

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# A statement of knights and knaves by its kind: what it says, and whether it is true where `knights` is so.
STATEMENTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "knave": ("{0} is a knave", lambda knights, a, b, count: not knights[a]),
    "same": ("{0} and {1} are of the same kind", lambda knights, a, b, count: knights[a] == knights[b]),
    "either": ("{0} or {1} is a knight, or both", lambda knights, a, b, count: knights[a] or knights[b]),
    "if": ("if {0} is a knight, so is {1}", lambda knights, a, b, count: not knights[a] or knights[b]),
    "count": ("exactly {2} of us are knights", lambda knights, a, b, count: sum(knights) == count),
}


def _consistent(knights: Sequence[bool], statements: Sequence[Sequence[Any]]) -> bool:
    """Whether every knight tells the truth and every knave does not."""
    return all(
        STATEMENTS[kind][1](knights, a, b, count) == knight
        for knight, (kind, a, b, count) in zip(knights, statements, strict=True)
    )


def make_knights_and_knaves(rng: random.Random, people: int) -> Made:
    names = rng.sample(NAMES, people)
    while True:
        statements: list[list[Any]] = []
        for speaker in range(people):
            a, b = rng.sample([each for each in range(people) if each != speaker], 2)
            statements.append([rng.choice(list(STATEMENTS)), a, b, rng.randint(0, people)])
        worlds = (each for each in itertools.product((False, True), repeat=people) if _consistent(each, statements))
        found = list(itertools.islice(worlds, 2))
        if len(found) == 1:
            break
    said = "\n".join(
        f'{name} says: "{STATEMENTS[kind][0].format(names[a], names[b], count)}."'
        for name, (kind, a, b, count) in zip(names, statements, strict=True)
    )
    question = f"Knights always tell the truth, knaves never. Of {', '.join(names)}, who is what?\n{said}"
    solution = "\n".join(
        f"{name}: {'knight' if knight else 'knave'}" for name, knight in zip(names, found[0], strict=True)
    )
    return (
        question,
        "a line `name: knight` or `name: knave` for each",
        {"names": names, "statements": statements},
        solution,
    )


def check_knights_and_knaves(data: Mapping[str, Any], answer: str) -> bool:
    pairs = read_pairs(answer)
    if set(pairs) != set(data["names"]) or not set(pairs.values()) <= {"knight", "knave"}:
        return False
    return _consistent([pairs[name] == "knight" for name in data["names"]], data["statements"])


ATTRIBUTES = {
    "colour": ("red", "green", "blue", "white", "black"),
    "pet": ("cat", "dog", "fish", "bird", "horse"),
    "drink": ("tea", "milk", "juice", "water", "coffee"),
    "job": ("baker", "pilot", "nurse", "judge", "farmer"),
}
CLUES: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "same": ("The house with {0} is the house with {1}.", lambda a, b: a == b),
    "left": ("The house with {0} is directly left of the house with {1}.", lambda a, b: a + 1 == b),
    "beside": ("The house with {0} is directly beside the house with {1}.", lambda a, b: abs(a - b) == 1),
    "apart": ("The house with {0} is not the house with {1}.", lambda a, b: a != b),
    "before": ("The house with {0} is somewhere left of the house with {1}.", lambda a, b: a < b),
}


def _worlds(values: Sequence[Sequence[str]], clues: Sequence[Sequence[str]]) -> Iterator[dict[str, int]]:
    """Every way to give each value a house so that the clues are true; attribute by attribute."""

    def extend(house: dict[str, int], rest: Sequence[Sequence[str]]) -> Iterator[dict[str, int]]:
        if not rest:
            yield house
            return
        for order in itertools.permutations(range(len(rest[0]))):
            more = house | dict(zip(rest[0], order, strict=True))
            new = set(rest[0])
            if all(
                CLUES[kind][1](more[a], more[b])
                for kind, a, b in clues
                if (a in new or b in new) and a in more and b in more
            ):
                yield from extend(more, rest[1:])

    return extend({}, values)


def make_zebra(rng: random.Random, houses: int, attributes: int) -> Made:
    names = rng.sample(list(ATTRIBUTES), attributes)
    values = [rng.sample(ATTRIBUTES[name], houses) for name in names]
    truth = {value: house for row in values for house, value in enumerate(row)}
    possible = [
        [kind, a, b]
        for kind, (_, holds) in CLUES.items()
        for one, other in itertools.permutations(values, 2)
        for a, b in itertools.product(one, other)
        if holds(truth[a], truth[b])
    ]
    rng.shuffle(possible)
    clues: list[list[str]] = []
    while world := next((each for each in _worlds(values, clues) if each != truth), None):
        # A true clue that the other world breaks; there is one, since it has some value in another house.
        broken = (each for each in possible if not CLUES[each[0]][1](world[each[1]], world[each[2]]))
        if (clue := next(broken, None)) is None:  # worlds that differ by their mirror alone: the first house is told
            return make_zebra(rng, houses, attributes)
        clues.append(clue)
    listed = "\n".join(f"{name}: {', '.join(sorted(row))}" for name, row in zip(names, values, strict=True))
    said = "\n".join(CLUES[kind][0].format(a, b) for kind, a, b in clues)
    question = (
        f"{houses} houses stand in a row, numbered from the left. Each has one of each of these, all "
        f"different:\n{listed}\n"
        f"What has each house?\n{said}"
    )
    form = f"a line `number: {', '.join(names)}` for each house"
    solution = "\n".join(f"{i + 1}: {', '.join(each)}" for i, each in enumerate(zip(*values, strict=True)))
    return question, form, {"values": values, "clues": clues}, solution


def check_zebra(data: Mapping[str, Any], answer: str) -> bool:
    pairs, values = read_pairs(answer), data["values"]
    houses = len(values[0])
    if set(pairs) != {str(i + 1) for i in range(houses)}:
        return False
    rows = [[each.strip() for each in pairs[str(i + 1)].split(",")] for i in range(houses)]
    if any(len(row) != len(values) for row in rows):
        return False
    columns = list(zip(*rows, strict=True))
    if any(sorted(column) != sorted(known) for column, known in zip(columns, values, strict=True)):
        return False
    house = {value: i for i, row in enumerate(rows) for value in row}
    return all(CLUES[kind][1](house[a], house[b]) for kind, a, b in data["clues"])


def make_satisfiability(rng: random.Random, variables: int, clauses: int) -> Made:
    names = LETTERS[:variables].upper()
    truth = {name: rng.random() < 0.5 for name in names}
    while True:
        formula: list[list[list[Any]]] = []
        while len(formula) < clauses:
            clause: list[list[Any]] = [[name, rng.random() < 0.5] for name in rng.sample(names, 3)]
            if any(truth[name] == sign for name, sign in clause):
                formula.append(clause)
        # Neither all true nor all false may do.
        if not any(_satisfied(formula, dict.fromkeys(names, value)) for value in (True, False)):
            break
        truth = {name: rng.random() < 0.5 for name in names}
    said = " and\n".join(
        "(" + " or ".join(name if sign else f"not {name}" for name, sign in clause) + ")" for clause in formula
    )
    solution = "\n".join(f"{name}: {str(value).lower()}" for name, value in truth.items())
    data = {"names": names, "formula": formula}
    return f"Which values make this true?\n{said}", "a line `LETTER: true` or `LETTER: false` for each", data, solution


def _satisfied(formula: Sequence[Any], values: Mapping[str, bool]) -> bool:
    return all(any(values[name] == sign for name, sign in clause) for clause in formula)


def check_satisfiability(data: Mapping[str, Any], answer: str) -> bool:
    pairs = read_pairs(answer)
    if set(pairs) != set(data["names"]) or not set(pairs.values()) <= {"true", "false"}:
        return False
    return _satisfied(data["formula"], {name: value == "true" for name, value in pairs.items()})


GOODS = ("a lamp", "a book", "a kite", "a drum", "a ring", "a map", "a clock", "a rope")


def make_goods_exchange(rng: random.Random, people: int, trades: int) -> Made:
    names, goods = rng.sample(NAMES, people), rng.sample(GOODS, people)
    owner = dict(zip(names, goods, strict=True))
    told = [f"{name} has {good}." for name, good in owner.items()]
    for _ in range(trades):
        a, b = rng.sample(names, 2)
        told.append(
            f"{a} and {b} exchange what they have."
            if rng.random() < 0.5
            else f"Whoever has {owner[a]} exchanges it for what {b} has."
        )
        owner[a], owner[b] = owner[b], owner[a]
    solution = "\n".join(f"{name}: {good}" for name, good in owner.items())
    return "Who has what in the end?\n" + "\n".join(told), "a line `name: thing` for each", {"owner": owner}, solution


def check_goods_exchange(data: Mapping[str, Any], answer: str) -> bool:
    def bare(pairs: Mapping[str, str]) -> dict[str, str]:
        return {name: good.removeprefix("a ") for name, good in pairs.items()}

    return bare(read_pairs(answer)) == bare(data["owner"])


def _word(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("bdfgklmnprst" if i % 2 == 0 else "aeiou") for i in range(length))


def make_word_sorting(rng: random.Random, words: int) -> Made:
    alphabet = "".join(rng.sample(LETTERS, len(LETTERS)))
    start = _word(rng, 2)
    listed = list(dict.fromkeys(rng.choice(["", start]) + _word(rng, rng.randint(2, 5)) for _ in range(words)))
    ordered = sorted(listed, key=lambda word: [alphabet.index(letter) for letter in word])
    question = f"Sort these words by the alphabet {' '.join(alphabet)}: {', '.join(listed)}"
    return question, "the words in order, separated by spaces", {"ordered": ordered}, " ".join(ordered)


def check_word_sorting(data: Mapping[str, Any], answer: str) -> bool:
    return answer.replace(",", " ").split() == data["ordered"]


BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def make_brackets(rng: random.Random, opened: int, closed: int) -> Made:
    text, stack = "", list[str]()
    steps = ["open"] * opened + ["close"] * closed
    rng.shuffle(steps)
    for step in steps:
        if step == "open" or not stack:
            stack.append(rng.choice(list(BRACKETS)))
            text += stack[-1]
        else:
            text += BRACKETS[stack.pop()]
    stack.append(rng.choice(list(BRACKETS)))
    text += stack[-1]
    rest = "".join(BRACKETS[each] for each in reversed(stack))
    question = f"Which brackets close all that are open here, in order? {' '.join(text)}"
    return question, "the closing brackets alone", {"rest": rest}, " ".join(rest)


def check_brackets(data: Mapping[str, Any], answer: str) -> bool:
    return "".join(answer.split()) == data["rest"]


def make_cipher(rng: random.Random, words: int, keyed: bool) -> Made:
    plain = " ".join(_word(rng, rng.randint(4, 7)) for _ in range(words))
    if keyed:
        code = "".join(rng.sample(LETTERS, len(LETTERS)))
        rule = f"the letters {' '.join(LETTERS)} become {' '.join(code)}"
    else:
        shift = rng.randint(3, 22)
        code = LETTERS[shift:] + LETTERS[:shift]
        rule = f"each letter becomes the one {shift} places later in the alphabet, a following z"
    secret = plain.translate(str.maketrans(LETTERS, code))
    return f"In a cipher {rule}. What did this say? {secret}", "the text alone", {"plain": plain}, plain


def check_cipher(data: Mapping[str, Any], answer: str) -> bool:
    return " ".join(answer.lower().split()) == data["plain"]


STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # north, east, south, west


def make_directions(rng: random.Random, moves: int) -> Made:
    x = y = heading = 0
    told = []
    for _ in range(moves):
        turn = rng.choice(["left", "right", "around"])
        heading = (heading + {"left": 3, "right": 1, "around": 2}[turn]) % 4
        length = rng.randint(1, 20)
        x, y = x + length * STEPS[heading][0], y + length * STEPS[heading][1]
        told.append(f"Turn {turn} and go {length}.")
    question = f"You are at (0, 0) and look north, where y grows; x grows to the east. {' '.join(told)} Where are you?"
    return question, "x and y, separated by a comma", {"place": [x, y]}, f"{x}, {y}"


def check_directions(data: Mapping[str, Any], answer: str) -> bool:
    return read_integers(re.sub(r"[()]", "", answer)) == data["place"]
