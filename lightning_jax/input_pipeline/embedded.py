"""The corpus every installation carries: technical English and Python from the standard library and our requirements.

"text" is what people wrote for people: docstrings, the language reference of `pydoc`, licences, readmes. "code" is
source files without their docstrings. A module gives either its docstrings or its code, decided by a hash of its
path, so the two parts share nothing. Given the same package versions the corpus is the same, byte for byte.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FORMAT_VERSION = 1  # part of the fingerprint: raise it when the documents change
TEXT_BYTES = 8_000_000
CODE_BYTES = 4_000_000
MODULE_BYTES = range(500, 300_000)  # shorter ones say nothing, longer ones are tables or generated

# What `pip install lightning_jax` brings, as far as it is Python that people wrote.
PACKAGES = (
    "absl-py",
    "array_record",
    "etils",
    "flax",
    "grain",
    "jax",
    "matplotlib",
    "ml_collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pyarrow",
    "scipy",
    "tensorboardX",
    "tensorflow-datasets",
    "tensorstore",
    "tokenizers",
    "treescope",
)
# Test data, tables and copies of other packages: neither prose nor code worth learning.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "mpl-data",
    "pydoc_data",
    "site-packages",
    "test",
    "testdata",
    "testing",
    "tests",
    "url_checksums",
}
_SKIPPED_ENDINGS = ("_test.py", "_pb2.py", "_pb2_grpc.py")
_PROSE_NAMES = ("license", "licence", "readme", "copying", "notice", "authors", "changes", "changelog")
_PROSE_ENDINGS = ("", ".txt", ".md", ".rst")


class _File(NamedTuple):
    rank: bytes  # orders files at random, yet the same everywhere
    location: str  # package and relative path, the same on every machine
    path: Path


class EmbeddedCorpus:
    """One part of the embedded corpus, built when `documents` is first asked for (some seconds) and kept in memory.

    Args:
      part: "text" or "code".
    """

    def __init__(self, part: str):
        self._part = part
        self._versions = {"Python": platform.python_version()}
        for package in PACKAGES:
            try:
                self._versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue

    @property
    def fingerprint(self) -> str:
        """Depends on the version of Python and of each package, which decide the documents."""
        versions = [f"{package} {version}" for package, version in self._versions.items()]
        return hashlib.sha256("\n".join([f"{FORMAT_VERSION} {self._part}", *versions]).encode()).hexdigest()

    @property
    def owners(self) -> tuple[str, ...]:
        """Python and the packages that are installed."""
        return tuple(self._versions)

    @property
    def documents(self) -> list[tuple[str, str]]:
        """(location, text) pairs, no text twice, of about TEXT_BYTES or CODE_BYTES together."""
        return _documents(self._part, self.owners)

    @property
    def description(self) -> str:
        """Size, number of documents and the packages that gave the most."""
        sizes: dict[str, int] = {}
        for location, text in self.documents:
            owner = location.partition("/")[0]
            sizes[owner] = sizes.get(owner, 0) + len(text)
        total = sum(sizes.values())
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
        shares = ", ".join(f"{owner} {100 * size / max(total, 1):.0f}%" for owner, size in largest)
        kind = "technical English" if self._part == "text" else "Python"
        return f"{kind}, {total / 1e6:.1f} MB in {len(self.documents):,} documents: {shares}"


@functools.cache
def _documents(part: str, owners: tuple[str, ...]) -> list[tuple[str, str]]:
    candidates, limit = (_text(owners), TEXT_BYTES) if part == "text" else (_code(owners), CODE_BYTES)
    documents, seen, size = [], set(), 0
    with _no_garbage_collection():
        for location, text in candidates:
            if text in seen:
                continue
            seen.add(text)
            documents.append((location, text))
            size += len(text)
            if size >= limit:
                break
    return documents


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees have no cycles; looking for some in them would take more time than making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _text(owners: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield f"Python/pydoc/{topic}", text.strip()
    for file in _files(owners):
        if not file.location.endswith(".py") and (text := _read(file.path)) is not None and _is_prose(text):
            yield file.location, text.strip()
    seen: set[str] = set()
    for file, source in _modules(owners, is_code=False):
        docstrings = [(name, text) for name, text in _docstrings(source, file.location) if text not in seen]
        seen.update(text for _, text in docstrings)
        if docstrings:
            yield file.location, "\n\n\n".join(f"{name}\n\n{text}" for name, text in docstrings)


def _code(owners: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for file, source in _modules(owners, is_code=True):
        if text := _without_docstrings(source):
            yield file.location, text


def _modules(owners: tuple[str, ...], *, is_code: bool) -> Iterator[tuple[_File, str]]:
    """The modules whose code, or whose docstrings, the corpus takes: one in four gives code."""
    for file in _files(owners):
        belongs = file.location.endswith(".py") and (file.rank[-1] % 4 == 0) == is_code
        if belongs and (source := _read(file.path)) is not None:
            yield file, source


@functools.cache
def _files(owners: tuple[str, ...]) -> list[_File]:
    """Every file that may be in the corpus, in the order of their ranks."""
    named = list(_standard_library_files())
    for package in owners:
        if package != "Python":
            for entry in importlib.metadata.files(package) or ():
                if _is_wanted(entry.name) and _SKIPPED_FOLDERS.isdisjoint(entry.parts):
                    named.append((f"{package}/{_without_version(entry.as_posix())}", Path(entry.locate())))
    return sorted(_File(hashlib.sha256(location.encode()).digest(), location, path) for location, path in named)


def _standard_library_files() -> Iterator[tuple[str, Path]]:
    root = sysconfig.get_path("stdlib")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in filter(_is_wanted, names):
            path = Path(folder, name)
            yield f"Python/{path.relative_to(root).as_posix()}", path


def _is_wanted(name: str) -> bool:
    stem, ending = os.path.splitext(name.lower())
    if ending == ".py":
        return not name.endswith(_SKIPPED_ENDINGS)
    return ending in _PROSE_ENDINGS and stem.startswith(_PROSE_NAMES)


def _without_version(name: str) -> str:
    """numpy-2.4.6.dist-info/licenses/LICENSE.txt without the version."""
    folder, slash, rest = name.partition("/")
    return f"{folder.partition('-')[0]}{slash}{rest}" if folder.endswith(".dist-info") else name


def _read(path: Path) -> str | None:
    try:
        if path.stat().st_size not in MODULE_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # listed but not installed; in another encoding
        return None


def _is_prose(text: str) -> bool:
    """Long enough to say something, and made of words rather than tables or drawings."""
    return len(text) >= 200 and sum(map(str.isalpha, text)) + text.count(" ") >= 0.7 * len(text)


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return None


_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstring(scope: _Scope) -> ast.Expr | None:
    first = scope.body[0] if scope.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first
    return None


def _scopes(scope: _Scope, name: str) -> Iterator[tuple[_Scope, str]]:
    """A module, class or function and those defined directly in its body, with their dotted names."""
    yield scope, name
    for statement in scope.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _scopes(statement, f"{name}.{statement.name}")


def _docstrings(source: str, location: str) -> Iterator[tuple[str, str]]:
    """The dotted name of what it describes, and the text, of each docstring that is prose."""
    path = location.partition("/")[2]
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if (tree := _parse(source)) is None:
        return
    for scope, name in _scopes(tree, module):
        if (statement := _docstring(scope)) is not None:
            text = inspect.cleandoc(statement.value.value)
            if _is_prose(text):
                yield name, text


def _without_docstrings(source: str) -> str | None:
    """The source without its docstrings and opening comment, still valid Python; None where nothing is left."""
    if (tree := _parse(source)) is None:
        return None
    lines: list[str | None] = list(source.splitlines())
    if len(lines) != source.count("\n") + (not source.endswith("\n")):
        return None  # form feeds and the like, at which ast does not count a line
    for scope in ast.walk(tree):
        if isinstance(scope, _Scope) and (statement := _docstring(scope)) is not None:
            indent = lines[statement.lineno - 1][: statement.col_offset]
            if indent.strip():
                return None  # a one-line body
            lines[statement.lineno - 1 : statement.end_lineno] = [None] * (statement.end_lineno - statement.lineno + 1)
            if len(scope.body) == 1 and not isinstance(scope, ast.Module):
                lines[statement.lineno - 1] = f"{indent}pass"
    kept = [line for line in lines if line is not None]
    # The same licence opens every file of a package.
    body = itertools.dropwhile(lambda line: not line.strip() or line.startswith("#"), kept)
    text = "\n".join(body).rstrip()
    return f"{text}\n" if text else None
