"""No module imports itself by way of others, not even for its types."""

from graphlib import TopologicalSorter

from modules import modules


def imports():
    """For each module of ours, those that it names in an import."""
    named = {".".join(parts): names for parts, names in modules() if parts[-1] != "__init__"}
    graph = {}
    for module, names in named.items():
        own = [name[1:] for name in names if name.startswith(".")]  # a module, or what is in one
        graph[module] = {*own, *(name.rpartition(".")[0] for name in own)} & set(named)
    return graph


def test_no_cycle():
    # Makers of ends import their transport when asked, and a transport does not import the registry.
    list(TopologicalSorter(imports()).static_order())
