"""The embedded corpus: valid, without copies, the same every time."""

import ast
import hashlib
import os
import subprocess
import sys

import pytest

from lightning_jax.input_pipeline import embedded
from lightning_jax.input_pipeline.embedded import EmbeddedCorpus

SOURCE = '''# Copyright
"""Module."""
import os

class A(Exception):
    """Only a docstring."""

def f(x):
    r"""Two
    lines."""
    text = """not a docstring"""
    return text

async def g():
    'single quotes'

def h(): "on the line"; return 1
'''


@pytest.fixture(scope="module")
def corpora():
    return {part: EmbeddedCorpus(part) for part in ("text", "code")}


@pytest.mark.slow
def test_parts_have_their_size_and_no_copies(corpora):
    for part, limit in (("text", embedded.TEXT_BYTES), ("code", embedded.CODE_BYTES)):
        texts = [text for _, text in corpora[part].documents]
        size = sum(map(len, texts))
        assert limit / 2 < size < 1.1 * limit
        assert len(set(texts)) == len(texts)
        assert all(text.strip() for text in texts)


@pytest.mark.slow
def test_no_module_gives_both_text_and_code(corpora):
    locations = [{location for location, _ in corpora[part].documents} for part in ("text", "code")]
    assert not locations[0] & locations[1]


@pytest.mark.slow
def test_code_is_valid_and_has_no_docstrings(corpora):
    for location, text in corpora["code"].documents[::10]:
        for node in ast.walk(ast.parse(text, location)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None, f"{location}: {node}"


@pytest.mark.slow
def test_text_holds_the_docstrings_of_its_modules(corpora):
    documents = dict(corpora["text"].documents)
    found = [name for name in documents if name.startswith("Python/") and name.endswith(".py")]
    assert found
    assert any("Parameters\n----------" in text for text in documents.values())
    assert any(name.startswith("Python/pydoc/") for name in documents)


@pytest.mark.slow
def test_other_processes_build_the_same_corpus(corpora):
    script = (
        "import hashlib; from lightning_jax.input_pipeline.embedded import EmbeddedCorpus\n"
        "print(hashlib.sha256(repr(EmbeddedCorpus('code').documents).encode()).hexdigest())"
    )
    output = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == hashlib.sha256(repr(corpora["code"].documents).encode()).hexdigest()


@pytest.mark.slow
def test_description_says_what_it_is_made_of(corpora):
    assert corpora["text"].description.startswith("technical English, 8.")
    assert corpora["code"].description.startswith("Python, 4.")
    assert "numpy" in corpora["text"].description


def test_fingerprint_depends_on_part_and_versions(monkeypatch):
    before = {EmbeddedCorpus(part).fingerprint for part in ("text", "code")}
    assert len(before) == 2
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0.1")
    assert EmbeddedCorpus("text").fingerprint not in before


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGES", ("no-such-package", "numpy"))
    assert EmbeddedCorpus("text").owners == ("Python", "numpy")


def test_docstrings_are_taken_with_their_names(monkeypatch):
    monkeypatch.setattr(embedded, "_is_prose", lambda text: True)
    assert list(embedded._docstrings(SOURCE, "package/folder/module.py")) == [
        ("folder.module", "Module."),
        ("folder.module.A", "Only a docstring."),
        ("folder.module.f", "Two\nlines."),
        ("folder.module.g", "single quotes"),
        ("folder.module.h", "on the line"),
    ]


def test_docstrings_are_cut_out_of_code():
    with_newline, _ = SOURCE.rsplit("def h", 1)
    assert embedded._without_docstrings(with_newline) == (
        "import os\n\nclass A(Exception):\n    pass\n\ndef f(x):\n"
        '    text = """not a docstring"""\n    return text\n\nasync def g():\n    pass\n'
    )
    assert embedded._without_docstrings(SOURCE) is None  # a docstring that shares its line with code
    assert embedded._without_docstrings('"""Only this."""\n') is None
    assert embedded._without_docstrings("print 'Python 2'\n") is None


@pytest.mark.parametrize(("text", "expected"), [("short", False), ("word " * 50, True), ("0x1F, " * 50, False)])
def test_prose_is_long_and_made_of_words(text, expected):
    assert embedded._is_prose(text) is expected
