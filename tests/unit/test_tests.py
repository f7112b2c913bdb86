"""Tests look at what is public, and import no other test: what they share lies in tests/support."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
FILES = sorted(TESTS.rglob("*.py"))
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}  # of named tuples, and of os
OWN = {"self", "cls"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def reaches(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in OWN):
                yield ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [*".".join(modules).split("."), *(part for a in node.names for part in a.name.split("."))]
            yield from (name for name in names if is_private(name) or name.startswith("test_"))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (text for text in strings if any(map(is_private, text.split("."))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_private_is_reached(path):
    assert list(reaches(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "x._y",
        "from a import _b",
        "from test_a import b",
        "import a._b",
        "m.setattr(a, '_b', 1)",
        "m.setattr('a._b', 1)",
    ],
)
def test_what_is_reached_is_found(line):
    assert len(list(reaches(ast.parse(line)))) == 1
