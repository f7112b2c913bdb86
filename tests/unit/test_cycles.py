"""No module imports itself by way of others, not even for its types."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "agnmpi"


def imports():
    """For each module of ours, those that it names in an import, wherever that stands."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            continue
        own = ".".join(parts)
        graph[own] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
                base = ".".join(filter(None, base))
                graph[own] |= {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)} & names
    return graph


def test_no_cycle():
    # Makers of ends import their transport when asked, and a transport does not import the registry.
    list(TopologicalSorter(imports()).static_order())
