"""Where in a completion the answer stands.  Source: Tulu 3 (arXiv 2411.15124), section 6, and its verifiers."""

import re
from decimal import Decimal

# A sign belongs to the number unless it stands behind what it could be subtracted from.
NUMBER = re.compile(r"(?:(?<![\w)\]}.])[-+])?(?:\d+\.\d+|\.\d+|\d+)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
FINAL_ANSWER = re.compile(r"final answer is:?", re.IGNORECASE)
FORMULA = re.compile(r"(?<!\\)\$(?!\s)([^$]+?)(?<![\s\\])\$(?!\d)")  # as Pandoc tells formulas from prices


def final_part(text: str) -> str:
    """What follows the thinking: behind the last `</think>`, and inside the last `<answer>` where there is one."""
    behind = text.rpartition("</think>")[2]
    if "<answer>" in behind:
        behind = behind.rpartition("<answer>")[2].partition("</answer>")[0]
    return behind.strip()


def last_number(text: str) -> Decimal | None:
    """The last number of a text, as GSM8K's answers are read; commas between thousands are none of its digits."""
    numbers = NUMBER.findall(THOUSANDS.sub("", text))
    return Decimal(numbers[-1]) if numbers else None


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{} (or \fbox{}) whose braces close; of `\boxed 5`, what stands before the next $."""
    boxes = {match.end(): match[1] for match in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*(\{?)", text)}
    found = max((end for end, brace in boxes.items() if not brace), default=-1)
    end = len(text.partition("$")[0]) if found < 0 else found + len(text[found:].partition("$")[0])
    opened: list[int] = []
    # One pass, however many boxes are never closed: that too is what models write.
    for match in re.finditer(r"[{}]", text):
        if match[0] == "{":
            opened.append(match.end())
        elif opened and (start := opened.pop()) in boxes and start > found:
            found, end = start, match.start()
    return text[found:end].strip() if found >= 0 else None


def math_answer(text: str) -> str | None:
    r"""The answer of a solution as MATH's are read: in a box, else after "the final answer is", else in the last $...$.

    Two things are stricter than in Tulu 3. The first of these that there is counts, and not the others too: who may
    answer twice is right more often. And the formula has to stand in the last line: elsewhere, dollars are money.
    """
    if (answer := boxed(text)) is not None:
        return answer
    _, *behind = FINAL_ANSWER.split(text)
    if behind:
        line = behind[-1].partition("\n")[0].partition(". I hope it is correct")[0]
        return line.strip().removesuffix(".").strip("$ ")
    formulas = FORMULA.findall(last_line(text).replace("$$", "$"))
    return formulas[-1] if formulas else None


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.strip().rpartition("\n")[2]
