"""The modules of the package, and what each imports."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "agnmpi"


def modules():
    """Each module: its path within the package, as a tuple, and the names that it imports, wherever that stands.

    Our own names are without "agnmpi", and begin with a dot.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        parts, names = path.relative_to(PACKAGE).with_suffix("").parts, []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = list(parts[: len(parts) - node.level]) if node.level else []
                base += [node.module] if node.module else []
                names += ["." * bool(node.level) + ".".join([*base, alias.name]) for alias in node.names]
        yield parts, names
