"""The process in which a chat template runs: a line of JSON for each request on standard input, and for its answer.

It imports nothing but jinja2 and the standard library: it starts quickly, and there is little in it to reach for.
"""

import contextlib
import datetime
import functools
import json
import resource
import sys
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space
LONGEST_TEXT = 2**24  # characters


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says, put between two marks."""

    tags = {"generation"}  # noqa: RUF012  # of the class, as jinja2 reads it
    marks = ("", "")

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: jinja2.runtime.Macro) -> str:
        begin, end = self.marks
        return f"{begin}{caller()}{end}"


def environment(generation_marks: tuple[str, str] = ("", "")) -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own escapes what is special in HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    generation = type("Generation", (Generation,), {"marks": generation_marks})
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation])
    jinja.filters["tojson"] = tojson
    jinja.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return jinja


@functools.cache
def compiled(template: str, generation_marks: tuple[str, str]) -> jinja2.Template:
    return environment(generation_marks).from_string(template)


def render(template: jinja2.Template, chat: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """The text of a chat. Raises ValueError where it becomes too long, and whatever the template raises."""
    pieces, length = [], 0
    for piece in template.generate(messages=chat, **variables):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST_TEXT:
            raise ValueError(f"its text has more than {LONGEST_TEXT:,} characters")
    return "".join(pieces)


def describe(error: Exception) -> str:
    """One line."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f"line {line}: " if line else ""
    reason = "out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
    return where + " ".join(reason.split())


def answer(request: dict[str, Any]) -> dict[str, list[Any]]:
    """The texts, and for each what is wrong with it or None."""
    texts, problems = [], []
    for chat, variables in zip(request["chats"], request["variables"], strict=True):
        text, problem = "", None
        try:
            text = render(compiled(request["template"], tuple(request["generation_marks"])), chat, variables)
        except Exception as error:  # whatever a program from anywhere may raise
            problem = describe(error)
        texts.append(text)
        problems.append(problem)
    return {"texts": texts, "problems": problems}


def main() -> None:
    # Not every system limits the address space; there the limit of time must do.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
