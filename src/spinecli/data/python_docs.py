"""`builtin:python-docs`: prose that comes with every Python, the same for one version of it.

The first 400,000 characters of the reference manual are left out: they are measured on, so nothing may be fitted to
them.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DESCRIPTION = "Python's own documentation, from the end of its manual and its modules"
MEASURED_ON = 400_000
"""Characters of the manual, topic after topic in its own order, that are not in the text."""
_SENTENCE = 40
"""Characters below which a docstring is a label rather than prose."""
_NOT_PROSE = {"antigravity", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}


@cache
def python_docs() -> str:
    """The manual's topics beyond those that are measured on, then the docstrings of the standard library's modules."""
    docstrings = (text for file in _modules() for text in _docstrings(file))
    return "\n\n".join([*_topics(), *docstrings])


def _topics() -> Iterator[str]:
    """Whole topics that begin behind the characters that are measured on, which are joined by newlines.

    Some say again what an earlier topic says; those paragraphs are left out.
    """
    from pydoc_data.topics import topics

    measured: set[str] = set()
    start = 0
    for text in topics.values():
        if start < MEASURED_ON:
            measured.update(_paragraphs(text))
        elif own := [each for each in _paragraphs(text) if each not in measured]:
            yield "\n\n".join(own)
        start += len(text) + 1


def _paragraphs(text: str) -> list[str]:
    """What stands between blank lines, without the indentation around it."""
    return [piece.strip() for piece in text.split("\n\n") if piece.strip()]


def _modules() -> Iterator[Path]:
    """The files of the standard library's modules, by name."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - _NOT_PROSE):
        if (alone := library / f"{name}.py").is_file():
            yield alone
        elif (folder := library / name).is_dir():
            files = sorted(folder.rglob("*.py"))
            yield from (file for file in files if not {"test", "tests"} & set(file.relative_to(library).parts))


def _docstrings(file: Path) -> Iterator[str]:
    """Prose of a module, its classes and functions, in their order; none of a file that this Python cannot read."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and files of other encodings
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= _SENTENCE:
                yield text
