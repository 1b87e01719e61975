"""Puzzles of numbers: the game of 24, countdown, operators, cryptarithm, survo, numbrix, an operation of its own."""

import ast
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lightning_jax.rewards.puzzles.core import (
    Cell,
    Made,
    hide,
    lines_of,
    matches_given,
    neighbours,
    read_integer_grid,
    read_integers,
    read_pairs,
    reveal_until_unique,
    show,
    unique_clues,
)

OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
GRID = "the full grid, one line for each row, numbers separated by spaces"


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The value of a sum of + - * / and brackets, and the numbers in it. Raises ValueError for anything else."""
    if len(expression) > 200 or not re.fullmatch(r"[\d+\-*/()\s]+", expression, re.ASCII) or "//" in expression:
        raise ValueError("no expression")
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
                return OPERATIONS[type(operation)](value(left), value(right))
            case ast.Constant(int() as number):
                numbers.append(number)
                return Fraction(number)
        raise ValueError("no expression")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError("no expression") from error


def _reachable(numbers: Sequence[tuple[Fraction, str]]) -> Iterator[tuple[Fraction, str]]:
    """Every value of all the numbers, with an expression of it."""
    if len(numbers) == 1:
        yield numbers[0]
    for (i, (a, left)), (j, (b, right)) in itertools.permutations(enumerate(numbers), 2):
        rest = [each for k, each in enumerate(numbers) if k not in (i, j)]
        for sign, operation in zip("+-*/", OPERATIONS.values(), strict=True):
            if (sign in "+*" and i > j) or (sign == "/" and b == 0):
                continue
            yield from _reachable([*rest, (operation(a, b), f"({left} {sign} {right})")])


def _expression(numbers: Sequence[int], target: int) -> str | None:
    starts = [(Fraction(number), str(number)) for number in numbers]
    return next((text for value, text in _reachable(starts) if value == target), None)


def make_game_of_24(rng: random.Random, count: int, largest: int) -> Made:
    while True:
        numbers = [rng.randint(1, largest) for _ in range(count)]
        if solution := _expression(numbers, 24):
            break
    question = f"Make 24 of {', '.join(map(str, numbers))}, each used exactly once, with + - * / and brackets."
    return question, "the expression alone, such as (1 + 3) * 6", {"numbers": numbers}, solution


def check_game_of_24(data: Mapping[str, Any], answer: str) -> bool:
    value, used = evaluate(answer)
    return value == 24 and Counter(used) == Counter(data["numbers"])


def make_countdown(rng: random.Random, count: int, used: int) -> Made:
    while True:
        numbers = [rng.choice([*range(1, 11), 25, 50, 75, 100]) for _ in range(count)]
        starts = [(Fraction(number), str(number)) for number in rng.sample(numbers, used)]
        while len(starts) > 1:
            (a, left), (b, right) = starts.pop(rng.randrange(len(starts))), starts.pop(rng.randrange(len(starts)))
            sign = rng.choice("+-*")
            starts.append(
                (OPERATIONS[{"+": ast.Add, "-": ast.Sub, "*": ast.Mult}[sign]](a, b), f"({left} {sign} {right})")
            )
        target, solution = starts[0]
        if 100 < target < 1000 and target not in numbers:
            break
    question = (
        f"Make {target} of some of {', '.join(map(str, numbers))}, each used at most once, with + - * / and brackets."
    )
    return question, "the expression alone", {"numbers": numbers, "target": int(target)}, solution


def check_countdown(data: Mapping[str, Any], answer: str) -> bool:
    value, used = evaluate(answer)
    return value == data["target"] and not Counter(used) - Counter(data["numbers"])


def make_operators(rng: random.Random, count: int) -> Made:
    while True:
        numbers = [rng.randint(2, 9) for _ in range(count)]
        signs = [rng.choice("+-*") for _ in numbers[1:]]
        text = " ".join(itertools.chain.from_iterable(zip(map(str, numbers), [*signs, ""], strict=True))).strip()
        if len(set(signs)) > 1 and abs(value := int(evaluate(text)[0])) > 9:
            break
    hidden = " ? ".join(map(str, numbers))
    question = f"Replace each ? by + - or * so that it is true, with multiplication first: {hidden} = {value}"
    return question, "the left side with its operators", {"numbers": numbers, "value": value}, text


def check_operators(data: Mapping[str, Any], answer: str) -> bool:
    answer = answer.partition("=")[0]
    if set(answer) & set("()/"):
        return False
    value, numbers = evaluate(answer)
    return value == data["value"] and numbers == data["numbers"]


def make_cryptarithm(rng: random.Random, digits: int) -> Made:
    largest = 10**digits
    first, second = (rng.randrange(largest // 10, largest) for _ in range(2))
    words = [str(first), str(second), str(first + second)]
    letters = dict(zip(rng.sample("0123456789", 10), rng.sample("ABCDEFGHKLMNPRST", 10), strict=True))
    words = ["".join(letters[digit] for digit in word) for word in words]
    truth = {letter: int(digit) for digit, letter in letters.items()}
    # From the right, so that the solver can check a column as soon as its letters are known.
    order = list(dict.fromkeys(letter for column in _columns(words) for letter in column))
    place = {letter: cell for cell, letter in enumerate(order)}
    columns = [[place[letter] for letter in column] for column in _columns(words)]
    leading = {place[word[0]] for word in words}

    def check(values: list, cell: Cell) -> bool:
        carry = 0
        for column in columns:
            known = [values[each] for each in column]
            if None in known:
                return True
            carry, rest = divmod(sum(known[:-1]) + carry, 10)
            if rest != known[-1]:
                return False
        return carry == 0

    domains = [range(1 if cell in leading else 0, 10) for cell in range(len(order))]
    values = [truth[letter] for letter in order]
    given = unique_clues(values, domains, [range(len(order))], check, rng=rng)
    known = {order[cell]: values[cell] for cell in sorted(given)}
    question = (
        "Each letter is a digit, different letters are different digits, and no number begins with 0: "
        f"{words[0]} + {words[1]} = {words[2]}." + "".join(f" {letter} is {digit}." for letter, digit in known.items())
    )
    solution = "\n".join(f"{letter}: {truth[letter]}" for letter in sorted(order))
    return question, "a line `LETTER: digit` for each letter", {"words": words, "known": known}, solution


def _columns(words: Sequence[str]) -> list[str]:
    """The letters of each column from the right, the sum's last."""
    reverse = [word[::-1] for word in words]
    return ["".join(word[i] for word in reverse if i < len(word)) for i in range(len(words[-1]))]


def check_cryptarithm(data: Mapping[str, Any], answer: str) -> bool:
    letters = set("".join(data["words"]))
    pairs = read_pairs(answer)
    if set(pairs) != letters or any(not re.fullmatch("[0-9]", digit) for digit in pairs.values()):
        return False
    first, second, total = ("".join(pairs[letter] for letter in word) for word in data["words"])
    return (
        len(set(pairs.values())) == len(letters)
        and not any(word.startswith("0") for word in (first, second, total))
        and int(first) + int(second) == int(total)
        and all(pairs[letter] == str(digit) for letter, digit in data["known"].items())
    )


def make_survo(rng: random.Random, width: int, height: int, clues: int) -> Made:
    count, lines = width * height, lines_of(width, height)
    truth = rng.sample(range(1, count + 1), count)
    sums = [sum(truth[cell] for cell in line) for line in lines]

    def check(values: list, cell: Cell) -> bool:
        for line, total in zip(lines, sums, strict=True):
            known = [values[each] for each in line if values[each] is not None]
            if cell in line and (sum(known) > total or (len(known) == len(line) and sum(known) != total)):
                return False
        return True

    domains, start = [range(1, count + 1)] * count, rng.sample(range(count), clues)
    given = hide(truth, unique_clues(truth, domains, [range(count)], check, rng=rng, given=start))
    question = (
        f"Fill in the numbers 1 to {count}, each once, so that the rows sum to {sums[:height]} and the columns to "
        f"{sums[height:]}.\n\n{show(given, width)}"
    )
    return question, GRID, {"given": given, "sums": sums, "width": width, "height": height}, show(truth, width)


def check_survo(data: Mapping[str, Any], answer: str) -> bool:
    width, height = data["width"], data["height"]
    values = read_integer_grid(answer, width, height)
    sums = [sum(values[cell] for cell in line) for line in lines_of(width, height)]
    each_once = sorted(values) == list(range(1, width * height + 1))
    return each_once and sums == data["sums"] and matches_given(values, data["given"])


def _random_path(rng: random.Random, size: int) -> list[Cell]:
    """A path through all cells: from one row by row, by turning round what lies behind a neighbour of its end."""
    around = neighbours(size, size, diagonal=False)
    path = [
        row * size + (column if row % 2 == 0 else size - 1 - column) for row in range(size) for column in range(size)
    ]
    for _ in range(20 * size**2):
        path = path[::-1] if rng.random() < 0.5 else path
        cut = path.index(rng.choice(around[path[-1]])) + 1
        path = path[:cut] + path[cut:][::-1]
    return path


def make_numbrix(rng: random.Random, size: int, clues: int) -> Made:
    path, around = _random_path(rng, size), neighbours(size, size, diagonal=False)
    truth = [path.index(cell) + 1 for cell in range(size**2)]

    def solve(given: set[Cell]) -> Iterator[list[int]]:
        place = {truth[cell]: cell for cell in given}
        values: list[int | None] = hide(truth, given)

        def walk(cell: Cell, number: int) -> Iterator[list[int]]:
            if number == size**2:
                yield [value for value in values if value is not None]
                return
            target = place.get(number + 1)
            for step in around[cell]:
                if step == target:
                    yield from walk(step, number + 1)
                elif target is None and values[step] is None:
                    values[step] = number + 1
                    yield from walk(step, number + 1)
                    values[step] = None

        yield from walk(truth.index(1), 1)

    given = hide(truth, reveal_until_unique(truth, {truth.index(1), *rng.sample(range(size**2), clues)}, solve, rng))
    question = (
        f"Fill in the numbers 1 to {size**2}, each once, so that every number is beside the next one in its row "
        "or column."
        f"\n\n{show(given, size)}"
    )
    return question, GRID, {"given": given, "size": size}, show(truth, size)


def check_numbrix(data: Mapping[str, Any], answer: str) -> bool:
    size = data["size"]
    values, around = read_integer_grid(answer, size, size), neighbours(size, size, diagonal=False)
    if sorted(values) != list(range(1, size**2 + 1)) or not matches_given(values, data["given"]):
        return False
    place = {number: cell for cell, number in enumerate(values)}
    return all(place[number + 1] in around[place[number]] for number in range(1, size**2))


def make_operation(rng: random.Random, depth: int) -> Made:
    a, b, c = rng.randint(2, 5), rng.choice([-4, -3, -2, 2, 3, 4]), rng.randint(-9, 9)
    numbers = [rng.randint(2, 9) for _ in range(depth + 1)]
    text, value = str(numbers[0]), numbers[0]
    for number in numbers[1:]:
        if rng.random() < 0.5:
            text, value = f"({text} # {number})", a * value + b * number + c
        else:
            text, value = f"({number} # {text})", a * number + b * value + c
    question = f"x # y means {a} * x + ({b}) * y + ({c}). What is {text[1:-1]}?"
    return question, "the number alone", {"value": value}, str(value)


def check_operation(data: Mapping[str, Any], answer: str) -> bool:
    return read_integers(answer) == [data["value"]]
