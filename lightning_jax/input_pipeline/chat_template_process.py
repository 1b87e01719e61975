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
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space
LONGEST_TEXT = 2**24  # characters


def environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own escapes what is special in HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    jinja.filters["tojson"] = tojson
    jinja.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return jinja


@functools.cache
def compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def render(template: str, chats: list[list[dict[str, Any]]], variables: dict[str, Any]) -> list[str]:
    """The text of each chat. Raises ValueError where one becomes too long, and whatever the template raises."""
    texts = []
    for chat in chats:
        pieces, length = [], 0
        for piece in compiled(template).generate(messages=chat, **variables):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                raise ValueError(f"its text has more than {LONGEST_TEXT:,} characters")
        texts.append("".join(pieces))
    return texts


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


def main() -> None:
    # Not every system limits the address space; there the limit of time must do.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            answer = {"texts": render(**json.loads(line))}
        except Exception as error:  # whatever a program from anywhere may raise
            answer = {"error": describe(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
