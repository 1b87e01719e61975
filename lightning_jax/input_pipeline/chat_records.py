"""Chats and preferences as data sets write them, brought into one form: a document of JSON for each record.

    conversations   {"messages": [{"role": "user", "content": "..."}, ...]}, and "tools" where the template reads them
    preferences     {"chosen": [...], "rejected": [...]}: two whole chats, or with {"prompt": ...} two answers to it;
                    "margin", a number, where the data say how much better the chosen one is
    prompts         {"prompt": ..., "ground_truth": "72"}: what to answer, and whatever else its verifier reads; or a
                    conversation, whose prompt stands before the assistant's first turn

A prompt or an answer may be a text instead of messages. The document is {"chats": [...], "tools": ..., "margin": ...},
its keys sorted, so that records that say the same are the same document.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_jax.input_pipeline.chat_template import Message
from lightning_jax.input_pipeline.readers import Problem, nearest

Content = Literal["text", "conversations", "preferences"]
FIELDS: dict[Content, tuple[str, ...]] = {
    "conversations": ("messages", "tools"),
    "preferences": ("chosen", "rejected", "prompt", "tools", "margin"),
}
CHATS_PER_EXAMPLE: dict[Content, int] = {"text": 1, "conversations": 1, "preferences": 2}


def chat_document(record: Any, content: Content) -> str | Problem:
    """The document of a record, or what is wrong with it and in which field."""
    try:
        record = _object(record)
        if content == "conversations":
            document = {"chats": [_answered(_messages(_field(record, "messages"), "messages"), "messages")]}
        else:
            document = {"chats": _pair(record)} | _margin(record)
    except _RecordError as error:
        return error.problem
    if record.get("tools"):
        document["tools"] = record["tools"]
    return json.dumps(document, sort_keys=True, ensure_ascii=False)


def chat_prompt(record: Any) -> tuple[list[Message], dict[str, Any]] | Problem:
    """What a record asks, and its other fields without those that are null; or what is wrong with it, and where."""
    try:
        record = _object(record)
        name = "messages" if record.get("prompt") is None and record.get("messages") is not None else "prompt"
        chat = _as_messages(_field(record, name), "user", name)
    except _RecordError as error:
        return error.problem
    if name == "messages":
        chat = _question(chat)
    if not chat or _is_answer(chat[-1]):
        return Problem("nothing to answer", f"{name!r} does not end with a message to the assistant")
    return chat, {field: value for field, value in record.items() if field != name and value is not None}


def read_document(document: bytes) -> dict[str, Any]:
    """What `chat_document` made."""
    return {"tools": None, "margin": 0.0} | json.loads(document)


def prompt(document: bytes) -> bytes:
    """What stands before the assistant's first turn: all documents with one prompt are held out, or none."""
    (first, *_) = json.loads(document)["chats"]
    return json.dumps(_question(first), sort_keys=True, ensure_ascii=False).encode()


class _RecordError(Exception):
    def __init__(self, problem: Problem):
        self.problem = problem


def _object(record: Any) -> dict[str, Any]:
    if isinstance(record, Problem):
        raise _RecordError(record)
    if not isinstance(record, dict):
        raise _RecordError(Problem("wrong type", f"the record is a {type(record).__name__}, not an object with fields"))
    return record


def _field(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise _RecordError(Problem("missing field", f"no field {name!r}{nearest(name, record)}"))
    return record[name]


def _pair(record: Mapping[str, Any]) -> list[list[Message]]:
    chats = []
    for name in ("chosen", "rejected"):
        answer = _as_messages(_field(record, name), "assistant", name)
        if answer and _is_answer(answer[0]):
            answer = [*_as_messages(_field(record, "prompt"), "user", "prompt"), *answer]
        chats.append(_answered(answer, name))
    if _question(chats[0]) != _question(chats[1]):
        raise _RecordError(Problem("no pair", "'chosen' and 'rejected' do not answer the same messages"))
    return chats


def _question(chat: list[Message]) -> list[Message]:
    """What stands before the assistant's first turn."""
    return list(itertools.takewhile(lambda message: not _is_answer(message), chat))


def _as_messages(value: Any, role: str, name: str) -> list[Message]:
    """Checked messages; a text is one of `role`."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, name)


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _margin(record: Mapping[str, Any]) -> dict[str, float]:
    margin = record.get("margin")
    if margin is None:
        return {}
    if not isinstance(margin, int | float) or isinstance(margin, bool):
        raise _RecordError(Problem("wrong type", f"'margin' is a {type(margin).__name__}, not a number"))
    return {"margin": float(margin)}


def _messages(value: Any, name: str) -> list[Message]:
    """Checked messages, without what is null in them: columnar files give every message every key."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _RecordError(Problem("wrong type", f"{name!r} is a {type(value).__name__}, not a list of messages"))
    messages = []
    for place, message in enumerate(value):
        where = f"{name}[{place}]"
        if not isinstance(message, dict):
            raise _RecordError(Problem("wrong type", f"'{where}' is a {type(message).__name__}, not a message"))
        message = {key: item for key, item in message.items() if item is not None}
        if not isinstance(message.get("role"), str):
            raise _RecordError(Problem("missing field", f"'{where}' has no role"))
        if "content" not in message and not message.get("tool_calls"):
            raise _RecordError(Problem("missing field", f"'{where}' has no content"))
        if not isinstance(message.get("content", ""), str | list):
            kind = type(message["content"]).__name__
            raise _RecordError(Problem("wrong type", f"'{where}.content' is a {kind}, not text"))
        messages.append(message)
    return messages


def _answered(messages: list[Message], name: str) -> list[Message]:
    if not any(map(_is_answer, messages)):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
        why = f"'{name}' has no message of the assistant; its roles: {roles}"
        raise _RecordError(Problem("nothing to train on", why))
    return messages
