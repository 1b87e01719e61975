"""The process in which math-verify compares two answers.

A request is {"gold": ..., "answer": ..., "line": ...}, where an answer of null is looked for in the line. What comes
back is {"equal": ..., "read": what was understood, "problem": null or why nothing could be compared}.
"""

import json
import logging
import os
import resource
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30  # bytes of address space
EXTRACTION = [LatexExtractionConfig(), ExprExtractionConfig()]


def read(text: str) -> list[Any]:
    return parse(text, EXTRACTION, parsing_timeout=None)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        gold = read(f"${request['gold']}$")
        given = read(request["line"] if request["answer"] is None else f"${request['answer']}$")
        equal = verify(gold, given, timeout_seconds=None)
    except Exception as error:  # whatever a parser may raise at texts from a model
        return {"equal": False, "read": "", "problem": f"{type(error).__name__}: {error}"[:200]}
    problem = None if gold else "the ground truth cannot be read"
    return {"equal": equal, "read": str(given[0]) if given else "", "problem": problem}


def main(cpu_seconds: int) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # parsers print warnings
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_seconds, hard))
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
