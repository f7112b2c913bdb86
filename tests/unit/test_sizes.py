"""Modules and folders are small enough to be read at once."""

import ast
import io
import tokenize
from collections import Counter
from statistics import median

from modules import PACKAGE

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def lines(node):
    return set(range(node.lineno, node.end_lineno + 1))


def code(text, tree):
    """The numbers of the lines of a module without docstrings, comments and blank lines."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in LAYOUT]
    documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and ast.get_docstring(node)]
    found = {number for t in tokens for number in range(t.start[0], t.end[0] + 1)}
    return found.difference(*(lines(node.body[0]) for node in documented))


def test_folders_modules_and_functions_are_small():
    sizes, long = {}, []
    for path in FILES:
        tree = ast.parse(path.read_text())
        numbers = code(path.read_text(), tree)
        sizes[str(path.relative_to(PACKAGE))] = len(numbers)
        scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        functions = [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)]
        long += [f"{path.stem}.{f.name} {n}" for f in functions if (n := len(numbers & lines(f))) > 50]
    assert not {path: size for path, size in sizes.items() if size > 300}
    assert median(sizes.values()) <= 120
    assert max(Counter(path.parent for path in FILES).values()) <= 15
    assert len(long) <= 3, long
